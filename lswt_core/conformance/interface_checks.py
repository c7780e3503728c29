"""Checks of every component before any other: it implements its interface, and importing it has no
effects.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from lswt_core import interfaces
from lswt_core.conformance.check import require, rule
from lswt_core.conformance.fresh_process import report_of
from lswt_core.conformance.subject import Subject
from lswt_core.registry.kinds import KINDS

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@rule(
    "interface",
    KINDS,
    why="the core calls what an interface declares, with the arguments that it declares",
    fix=(
        "implement every abstract method with the interface's parameters, and let the constructor"
        " take what the interface says it is built with"
    ),
)
def implements_its_interface(subject: Subject) -> None:
    """Nothing abstract is left, and methods and constructor take what the core passes."""
    component: Any = subject.component
    missing = sorted(getattr(component, "__abstractmethods__", ()))
    require(not missing, f"it does not implement {', '.join(missing)}")
    given = KINDS[subject.kind].given
    taken = most_arguments(inspect.signature(component))
    require(
        taken >= given,
        f"the constructor takes {taken} of the {given} arguments before the options",
    )
    for name, declared in declared_methods(component):
        signature = inspect.signature(getattr(component, name))
        arguments = [None] * len(positional_of(declared))
        keywords = dict.fromkeys(keywords_of(declared))
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{name}{signature} is called as {name}{declared}: {error}") from error


def declared_methods(component: type) -> Iterator[tuple[str, inspect.Signature]]:
    """The abstract methods of a component's interface, with the signatures they have there."""
    interface = next(base for base in component.__mro__ if base.__module__ == interfaces.__name__)
    for name in sorted(getattr(interface, "__abstractmethods__", ())):
        method = getattr(interface, name)
        if not isinstance(method, property):
            yield name, inspect.signature(method)


def positional_of(signature: inspect.Signature) -> list[inspect.Parameter]:
    """The positional parameters, self included."""
    return [one for one in signature.parameters.values() if one.kind in POSITIONAL]


def keywords_of(signature: inspect.Signature) -> list[str]:
    """The keyword-only parameters."""
    kind = inspect.Parameter.KEYWORD_ONLY
    return [one.name for one in signature.parameters.values() if one.kind is kind]


def most_arguments(signature: inspect.Signature) -> float:
    """The number of positional arguments that can be passed."""
    if any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in signature.parameters.values()):
        return float("inf")
    return len(positional_of(signature))


@rule(
    "import effects",
    KINDS,
    why=(
        "a plugin is imported in the middle of other people's runs: what an import changes, it"
        " changes for all of them"
    ),
    fix=(
        "change nothing at import: no seeds, default dtype or device, threads or flags of torch, no"
        " network and no GPU; do it where the component needs it, and undo it"
    ),
    after=("interface",),
)
def imports_without_effects(subject: Subject) -> None:
    """In a new process, importing the plugin draws and seeds nothing, sets no defaults of torch and
    opens no connection.
    """
    effects = report_of(subject)["effects"]
    require(not effects, f"importing {subject.offer.module} {', and '.join(effects)}")
