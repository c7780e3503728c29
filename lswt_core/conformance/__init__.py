"""The conformance kit: what every component promises, asked of yours before anything is trained.

import pytest
from lswt_core.conformance import checks

@pytest.mark.parametrize("check", checks("lswt_fading"), ids=str)
def test_conforms(check):
check()
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lswt_core.conformance import attention_checks as parts
from lswt_core.conformance import common_checks as every  # each registers its rules
from lswt_core.conformance import cross_entropy_checks as scoring
from lswt_core.conformance import data_checks as rest
from lswt_core.conformance import export_checks as hub
from lswt_core.conformance import model_checks as model
from lswt_core.conformance import schedules, start
from lswt_core.conformance import training_checks as training
from lswt_core.conformance.check import Check, Failed, checks_of
from lswt_core.conformance.subject import Subject
from lswt_core.errors import PluginError
from lswt_core.interfaces import Component
from lswt_core.registry import Offer, Registry
from lswt_core.registry.discover import normal

__all__ = [
    "Check",
    "Failed",
    "checks",
    "every",
    "hub",
    "model",
    "parts",
    "rest",
    "schedules",
    "scoring",
    "start",
    "training",
]


def checks(target: str | Path | ModuleType | type[Component], **options: Any) -> list[Check]:
    """The checks of every component that a target offers: the name of a package or module, a
    module, the path of a file, or a component class.

    ``options`` are given to the constructors that have them. Calling a check raises Failed, saying
    what was found, why it matters and how to mend it; unittest.SkipTest where it cannot be asked.
    Raises PluginError if nothing is offered.
    """
    found = [check for subject in subjects(target, options) for check in checks_of(subject)]
    if not found:
        raise PluginError(f"{target} offers no component")
    return found


def subjects(
    target: str | Path | ModuleType | type[Component], options: dict[str, Any]
) -> Iterator[Subject]:
    """The components of a target."""
    registry, offers = offered(target)
    for offer in offers:
        known = {option.name for option in offer.options}
        yield Subject(
            offer,
            registry.load(offer),
            registry,
            {name: value for name, value in options.items() if name in known},
        )


def offered(target: str | Path | ModuleType | type[Component]) -> tuple[Registry, list[Offer]]:
    """A registry that knows the target besides all that is installed, and what the target offers."""
    if isinstance(target, type):
        # a class may stand in a file of its package
        own, package = target.__module__, target.__module__.rpartition(".")[0]
        registry, offers = offered(
            import_module(own if hasattr(import_module(own), "lswt_components") else package)
        )
        return registry, [offer for offer in offers if registry.load(offer) is target]
    if isinstance(target, str | Path) and Path(target).suffix == ".py":
        return with_installed(Registry([], files=[Path(target)]))
    if isinstance(target, ModuleType):
        return with_installed(Registry([target]))
    named = [
        entry.module
        for entry in Registry().entries
        if normal(entry.distribution) == normal(str(target))
    ]
    try:
        return with_installed(
            Registry([import_module(module) for module in named or [str(target)]])
        )
    except ImportError as error:
        raise PluginError(
            f"{target} cannot be imported: {error}\n  fix: give an installed package, its module,"
            " or a .py file"
        ) from error


def with_installed(own: Registry) -> tuple[Registry, list[Offer]]:
    """The target's own entry first, then what is installed (partners are found there)."""
    offers = own.offers()
    if broken := own.broken():
        raise PluginError(broken[0].cause)
    modules = {offer.module for offer in offers}
    own.entries = (
        *own.entries,
        *(entry for entry in Registry().entries if entry.module not in modules),
    )
    return own, offers
