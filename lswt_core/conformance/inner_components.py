"""Components inside of the one under test: options as a recipe holds them, and as constructors get
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lswt_core.conformance.reference_text import ReferenceText
from lswt_core.model.spec import fill_components
from lswt_core.recipe.provenance import USE
from lswt_core.registry import REQUIRED, Offer, Registry

# The distribution of the reference components, also if the plugin under test uses their names.
CORE = "lswt-core"


def as_tables(offer: Offer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a recipe holds them: a component's name stands for its table."""
    inner = offer.inner
    return {
        name: {"use": value} if name in inner and isinstance(value, str) else value
        for name, value in options.items()
    }


def reference_options(offer: Offer, references: Mapping[str, str]) -> dict[str, Any]:
    """Reference components for the options that need one; ``references`` are those of the model's
    kinds.
    """
    found: dict[str, Any] = {}
    for option in offer.options:
        inner = offer.component_options.get(option.name)
        name = inner and {**USE, **references}.get(inner.kind)
        if inner is not None and name and option.default is REQUIRED:
            table = {"use": ReferenceText.name if inner.kind == "data" else f"{CORE}:{name}"}
            found[option.name] = {"one": table, "other": table} if inner.named else table
    return found


def constructor_options(
    registry: Registry, offer: Offer, options: Mapping[str, Any], *arguments: Any
) -> dict[str, Any]:
    """Options as a recipe holds them as the constructor gets them that is called with
    ``arguments``.
    """

    def builder(kind: str, table: Mapping[str, Any]) -> Callable[..., Any]:
        if (kind, table["use"]) == ("data", ReferenceText.name):
            return ReferenceText
        inner = registry.find(kind, table["use"])
        own = {name: value for name, value in table.items() if name != "use"}

        def build(*given: Any) -> Any:
            return registry.load(inner)(*given, **constructor_options(registry, inner, own, *given))

        return build

    filled = fill_components(options, offer.inner, builder, arguments)
    return {name: value for name, value in filled.items() if name in options}
