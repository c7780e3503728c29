"""The conformance kit: checks that a plugin's components do what their interfaces promise.

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

# Importing a module registers its rules.
from lswt_core.conformance import (
    attention_checks,
    carry_checks,
    common_checks,
    cross_entropy_checks,
    data_checks,
    export_checks,
    fingerprint_checks,
    forward_checks,
    head_checks,
    initialisation_checks,
    interface_checks,
    layer_checks,
    layer_loss_checks,
    length_checks,
    loss_checks,
    matrix_checks,
    model_checks,
    optimizer_checks,
    parametrisation_checks,
    parts_checks,
    positional_checks,
    schedule_checks,
    state_checks,
    training_checks,
)
from lswt_core.conformance.check import Check, Failed, checks_of
from lswt_core.conformance.subject import Subject
from lswt_core.errors import PluginError
from lswt_core.interfaces import Component
from lswt_core.registry import Offer, Registry
from lswt_core.registry.discover import normal

__all__ = [
    "Check",
    "Failed",
    "attention_checks",
    "carry_checks",
    "checks",
    "common_checks",
    "cross_entropy_checks",
    "data_checks",
    "export_checks",
    "fingerprint_checks",
    "forward_checks",
    "head_checks",
    "initialisation_checks",
    "interface_checks",
    "layer_checks",
    "layer_loss_checks",
    "length_checks",
    "loss_checks",
    "matrix_checks",
    "model_checks",
    "optimizer_checks",
    "parametrisation_checks",
    "parts_checks",
    "positional_checks",
    "schedule_checks",
    "state_checks",
    "training_checks",
]

Target = str | Path | ModuleType | type[Component]


def checks(target: Target, **options: Any) -> list[Check]:
    """The checks of every component that a target offers: the name of a package or module, a
    module, the path of a file, or a component class.

    ``options`` go to the constructors that have them. Calling a check raises Failed, which says
    what is wrong, why it matters and how to fix it, or unittest.SkipTest if it cannot run here.
    Raises PluginError if the target offers no component.
    """
    found = [check for subject in subjects(target, options) for check in checks_of(subject)]
    if not found:
        raise PluginError(f"{target} offers no component")
    return found


def subjects(target: Target, options: dict[str, Any]) -> Iterator[Subject]:
    """The components of a target, each with the options that it has."""
    registry, offers = find_offers(target)
    for offer in offers:
        known = {option.name for option in offer.options}
        own_options = {name: value for name, value in options.items() if name in known}
        yield Subject(offer, registry.load(offer), registry, own_options)


def find_offers(target: Target) -> tuple[Registry, list[Offer]]:
    """The components of a target, and a registry of these and of all installed components. Raises
    PluginError if the target cannot be imported.
    """
    if isinstance(target, type):
        return find_class(target)
    if isinstance(target, str | Path) and Path(target).suffix == ".py":
        return with_installed(Registry([], files=[Path(target)]))
    if isinstance(target, ModuleType):
        return with_installed(Registry([target]))
    modules = [
        entry.module
        for entry in Registry().entries
        if normal(entry.distribution) == normal(str(target))
    ]
    try:
        plugins = [import_module(module) for module in modules or [str(target)]]
        return with_installed(Registry(plugins))
    except ImportError as error:
        raise PluginError(
            f"{target} cannot be imported: {error}\n  fix: give an installed package, its module,"
            " or a .py file"
        ) from error


def find_class(component: type[Component]) -> tuple[Registry, list[Offer]]:
    """The offer of one component class, by its module or by the package around it."""
    plugin = component.__module__
    if not hasattr(import_module(plugin), "lswt_components"):
        plugin = plugin.rpartition(".")[0]
    registry, offers = find_offers(import_module(plugin))
    return registry, [offer for offer in offers if registry.load(offer) is component]


def with_installed(own: Registry) -> tuple[Registry, list[Offer]]:
    """Add all installed plugins to a registry, which partner components come from; returns it with
    its own offers. Raises PluginError if one of its own plugins is broken.
    """
    offers = own.offers()
    if broken := own.broken():
        raise PluginError(broken[0].cause)
    modules = {offer.module for offer in offers}
    installed = [entry for entry in Registry().entries if entry.module not in modules]
    own.entries = (*own.entries, *installed)
    return own, offers
