"""One attention backend for all arms of an ablation.

Where recipes leave the choice to "auto", every arm alone would take the first backend that meets
its requirements, and an arm with position biases would be compared across kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from lswt_core.device import Precision
from lswt_core.errors import Incompatible
from lswt_core.interfaces import AttentionRequirements
from lswt_core.model.attention_choice import attention_requirements, check_backend
from lswt_core.model.components import dims_of
from lswt_core.recipe import Chosen, Recipe
from lswt_core.registry import AUTO, Registry


class SharedAttention(NamedTuple):
    """The backend that "auto" stands for in every arm."""

    name: str
    baseline_choice: str  # what the baseline would take if it were the only arm
    refusals: tuple[str, ...]  # why arms cannot use that, nor another that "auto" prefers
    overrides: Mapping[str, tuple[str, ...]]  # of the arms' recipes, by arm

    def note(self) -> str:
        """Return why the baseline's own choice was not taken; empty if it was."""
        if self.name == self.baseline_choice:
            return ""
        return (
            f"attention is {self.name} in every arm, though the baseline alone would take"
            f" {self.baseline_choice}: {'; '.join(self.refusals)}"
        )


def share_attention(
    recipes: Mapping[str, Recipe], registry: Registry, device: torch.device
) -> SharedAttention | None:
    """Return the first backend that the baseline's "auto" prefers and every arm with the same
    "auto" can use; None where the baseline (the first recipe) names its backend.

    Raises Incompatible, with a reason for each backend, if there is none.
    """
    baseline, *_ = recipes
    auto = find_auto(recipes[baseline])
    if auto is None:
        return None
    arms = {name: recipe for name, recipe in recipes.items() if find_auto(recipe) == auto}
    needs = {name: requirements_of(recipe, registry, device) for name, recipe in arms.items()}
    choice, refusals = None, list[str]()
    for backend in auto.options["prefer"]:
        refused = find_refusals(backend, arms, needs, registry)
        if choice is None and baseline not in refused:
            choice, refusals = backend, []
        if choice is not None and not refused:
            overrides = {name: prefer_only(recipe, backend) for name, recipe in arms.items()}
            return SharedAttention(backend, choice, tuple(refusals), overrides)
        name, why = next(iter(refused.items()))
        refusals.append(f"arm {name} cannot take {backend}: {why}")
    raise Incompatible(
        "no attention backend that attention.use = 'auto' prefers serves every arm:\n  "
        + "\n  ".join(refusals)
    )


def find_auto(recipe: Recipe) -> Chosen | None:
    """Return the recipe's "auto", of whatever layers; None if it names its backends."""
    for chosen in recipe.every("attention"):
        if chosen.name == AUTO.name:
            return chosen
    return None


def requirements_of(
    recipe: Recipe, registry: Registry, device: torch.device
) -> list[AttentionRequirements]:
    """Return what the recipe requires of its attention backend, in the recipe's precision."""
    precision = Precision.choose(recipe.train.precision, device)
    return attention_requirements(recipe, registry, device, precision.dtype)


def find_refusals(
    backend: str,
    arms: Mapping[str, Recipe],
    needs: Mapping[str, list[AttentionRequirements]],
    registry: Registry,
) -> dict[str, str]:
    """Return, by arm, why a backend does not meet its requirements."""
    offer = registry.find("attention", backend)
    candidate = Chosen("attention", "attention", backend, offer, {})
    refused = {}
    for name, recipe in arms.items():
        try:
            check_backend(registry, candidate, dims_of(recipe), needs[name])
        except Incompatible as error:
            refused[name] = str(error.__cause__ or error)
    return refused


def prefer_only(recipe: Recipe, backend: str) -> tuple[str, ...]:
    """Return overrides that leave every "auto" of a recipe one choice."""
    tables = recipe.tables_with("attention", AUTO.name)
    return tuple(f'{table}.prefer=["{backend}"]' for table in tables)
