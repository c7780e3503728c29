"""What a component declares: the attributes of its interface, the optional methods it overrides,
and the libraries it needs. Read from the imported class.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

from lswt_core.registry.kinds import Kind


def capabilities(kind: Kind, component: type) -> dict[str, dict[str, Any]]:
    """Return each capability as {"value", "of"}.

    "of" is "class" if the value is fixed, "instance" if the constructor may set another depending
    on the options; "value" is then the default. "overrides" lists the optional methods of the
    interface that the component implements.
    """
    from lswt_core import interfaces  # torch

    interface = getattr(interfaces, kind.interface)
    values = {}
    for name, annotation in inspect.get_annotations(interface).items():
        given = getattr(component, name)
        fixed = str(annotation).startswith("ClassVar") and not isinstance(given, property)
        values[name] = {
            "value": None if isinstance(given, property) else plain(given),
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
    return values | ({"overrides": {"value": own, "of": "class"}} if optional else {})


def missing_library(component: type) -> str:
    """The optional packages of which a component needs one, if none is installed; else empty."""
    libraries = getattr(component, "libraries", ())
    if not libraries or any(find_spec(name) is not None for name in libraries):
        return ""
    return " or ".join(libraries)


def plain(value: Any) -> Any:
    """A value as JSON has it; a class by its name."""
    if isinstance(value, type):
        return getattr(value, "name", value.__name__)
    return sorted(value) if isinstance(value, set | frozenset) else value
