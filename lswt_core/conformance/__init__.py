"""The conformance kit: checks that a plugin's components do what their interfaces promise.

import pytest
from lswt_core.conformance import checks

@pytest.mark.parametrize("check", checks("lswt_fading"), ids=str)
def test_conforms(check):
    check()
"""

from __future__ import annotations

from collections.abc import Iterator
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
    sharding_checks,
    state_checks,
    training_checks,
)
from lswt_core.conformance.check import Check, Failed, checks_of
from lswt_core.conformance.subject import Subject
from lswt_core.conformance.targets import Target, find_offers
from lswt_core.errors import PluginError

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
    "sharding_checks",
    "state_checks",
    "training_checks",
]


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
