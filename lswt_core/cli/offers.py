"""Components as the ``plugins`` commands show them."""

from __future__ import annotations

from typing import Any

from lswt_core.errors import PluginError
from lswt_core.registry import REQUIRED, Offer, Registry
from lswt_core.registry.capabilities import missing_library
from lswt_core.registry.option_schema import bounds, plain, words


def load_class(registry: Registry, offer: Offer) -> tuple[type | None, str | None]:
    """The class behind an offer, and why it cannot be used: it cannot be imported (the class is
    None), or a library that it needs is not installed.
    """
    try:
        component = registry.load(offer)
    except PluginError as error:
        return None, str(error)
    missing = missing_library(component)
    return component, f"the package {missing} is not installed" if missing else None


def usable_json(cause: str | None) -> dict[str, Any]:
    """Whether a component and its libraries can be imported, as plain data."""
    return {"imports": cause is None, "cause": cause}


def offer_json(offer: Offer) -> dict[str, Any]:
    """An offer as plain data."""
    options = {
        option.name: {
            "type": annotation_text(plain(option.annotation)),
            "bounds": bounds(option.annotation),
            "means": words(option.annotation),
            "default": None if option.default is REQUIRED else option.default,
            "required": option.default is REQUIRED,
        }
        for option in offer.options
    }
    return offer._asdict() | {"options": options}


def annotation_text(annotation: Any) -> str:
    """A type as it is written in source code."""
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")
