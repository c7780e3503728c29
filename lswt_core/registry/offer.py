"""What the registry hands out: offers of components, their options, and plugins that could not be
read.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from annotated_types import MinLen

from lswt_core import __version__

REQUIRED: Any = inspect.Parameter.empty  # the default of an option that has none
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # no colon: "distribution:name" qualifies


class Option(NamedTuple):
    """A keyword-only parameter of a component's constructor."""

    name: str
    annotation: Any
    default: Any  # REQUIRED if there is none


class Offer(NamedTuple):
    """A component somebody offers, described without importing it."""

    kind: str
    name: str
    distribution: str
    version: str
    module: str
    source: str  # path of the file that defines it
    doc: str
    citation: str
    options: tuple[Option, ...]

    @property
    def qualified(self) -> str:
        """The name no other distribution can claim."""
        return f"{self.distribution}:{self.name}"


class Broken(NamedTuple):
    """A plugin that cannot be read or imported."""

    entry: str
    distribution: str
    version: str
    cause: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.entry}): {self.cause}"


AUTO = Offer(
    kind="attention",
    name="auto",
    distribution="lswt-core",
    version=__version__,
    module="lswt_core",
    source="",
    doc="The first attention backend of ``prefer`` that can do what the model needs.",
    citation="",
    options=(
        Option("prefer", Annotated[list[str], MinLen(1)], ["flash", "blocked", "sdpa", "eager"]),
    ),
)


def complaint(offers: Sequence[Offer]) -> str | None:
    """Why these offers of one plugin cannot stand, or None: a recipe must be able to write every
    name.
    """
    for offer in offers:
        if not NAME.fullmatch(offer.name):
            return (
                f"the {offer.kind} name {offer.name!r} must consist of letters, digits, '.', '_'"
                " and '-'"
            )
        reserved = {"use", "weight"} if offer.kind == "loss" else {"use"}
        for option in offer.options:
            if (
                option.name in reserved
                or option.name.startswith("_")
                or option.name == "model_config"
            ):
                return (
                    f"{offer.kind} {offer.name!r} has an option named {option.name!r}, which is"
                    " reserved"
                )
    twice = [
        key
        for key, times in Counter((offer.kind, offer.name) for offer in offers).items()
        if times > 1
    ]
    return f"it offers {twice[0][0]} {twice[0][1]!r} twice" if twice else None
