"""Descriptions of components, their options, and of plugins that cannot be read."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from annotated_types import MinLen

from lswt_core import __version__
from lswt_core.registry import component_option
from lswt_core.registry.component_option import ComponentOption
from lswt_core.registry.kinds import KINDS

REQUIRED: Any = inspect.Parameter.empty  # the default of an option that has none
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # no colon: "distribution:name" qualifies


class Option(NamedTuple):
    """A keyword-only parameter of a component's constructor."""

    name: str
    annotation: Any  # a type, or a ComponentOption
    default: Any  # REQUIRED if there is none


class Offer(NamedTuple):
    """A component that a plugin offers, described without importing it."""

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
    def component_options(self) -> dict[str, ComponentOption]:
        """The options that are components themselves, by name."""
        return {
            option.name: option.annotation
            for option in self.options
            if isinstance(option.annotation, ComponentOption)
        }

    @property
    def is_own(self) -> bool:
        """Whether it is of the core's own distribution."""
        return self.distribution == AUTO.distribution

    @property
    def inner(self) -> dict[str, tuple[str, int | None]]:
        """Of each option that is a component its kind, and with how many of its owner's positional
        arguments it is built; None: the owner builds it.
        """
        return {
            name: (option.kind, None if option.builder else KINDS[option.kind].given)
            for name, option in self.component_options.items()
        }

    @property
    def qualified(self) -> str:
        """The name with its distribution, which is unique: "lswt-kerple:kerple"."""
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


def find_flaw(offers: Sequence[Offer]) -> str | None:
    """Why one plugin cannot offer these components, or None. A recipe must be able to write every
    name.
    """
    for offer in offers:
        if not NAME.fullmatch(offer.name):
            return (
                f"the {offer.kind} name {offer.name!r} must consist of letters, digits, '.', '_'"
                " and '-'"
            )
        for option in offer.options:
            if is_reserved(option.name, offer.kind):
                return (
                    f"{offer.kind} {offer.name!r} has an option with a reserved name, {option.name}"
                )
            if flaw := find_option_flaw(offer, option):
                return f"the option {option.name!r} of {offer.kind} {offer.name!r}: {flaw}"
    for (kind, name), times in Counter((offer.kind, offer.name) for offer in offers).items():
        if times > 1:
            return f"it offers {kind} {name!r} twice"
    return None


def find_option_flaw(offer: Offer, option: Option) -> str | None:
    """Why a component cannot have an option that is a component, or None."""
    if not isinstance(option.annotation, ComponentOption):
        return None
    owner = KINDS[offer.kind]
    return component_option.find_flaw(option.annotation, owner, option.default, REQUIRED)


def is_reserved(option: str, kind: str) -> bool:
    """Whether an option's name has another meaning in a recipe, or in pydantic."""
    reserved = {"use", "model_config", *KINDS[kind].keys}
    return option in reserved or option.startswith("_")
