"""What a component says it can do: the attributes its interface declares, and the methods it
overrides. Read live, from the class.
"""

from __future__ import annotations

import inspect
from typing import Any

from lswt_core.registry.kinds import Kind


def capabilities(kind: Kind, component: type) -> dict[str, dict[str, Any]]:
    """Each capability as {"value", "of"}. Of a "class" it is so; of an "instance" it is told by
    what is built with options, and the value is what holds unless the constructor sets another.
    "overrides" lists the interface's optional methods that it implements.
    """
    from lswt_core import interfaces  # torch

    interface = getattr(interfaces, kind.interface)
    found = {}
    for name, annotation in inspect.get_annotations(interface).items():
        told = getattr(component, name)
        fixed = str(annotation).startswith("ClassVar") and not isinstance(told, property)
        found[name] = {
            "value": None if isinstance(told, property) else plain(told),
            "of": "class" if fixed else "instance",
        }
    optional = [
        name
        for name, method in vars(interface).items()
        if inspect.isfunction(method)
        and not name.startswith("_")
        and not getattr(method, "__isabstractmethod__", False)
    ]
    own = [name for name in optional if getattr(component, name) is not getattr(interface, name)]
    return found | ({"overrides": {"value": own, "of": "class"}} if optional else {})


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return sorted(value) if isinstance(value, set | frozenset) else value
