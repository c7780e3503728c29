"""One attention backend for all arms of an ablation. Where recipes leave the choice to "auto",
every arm alone would take the first that can do what it needs, and an arm with position biases
would be compared across kernels.
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


class Shared(NamedTuple):
    """The backend that "auto" stands for in every arm."""

    name: str
    alone: str  # what the baseline would take if it were the only arm
    against: tuple[str, ...]  # why it is not that, nor another that "auto" prefers
    overrides: Mapping[str, tuple[str, ...]]  # of the arms' recipes, by arm

    def text(self) -> str:
        """A line about a choice that the other arms have changed; empty if they have not."""
        if self.name == self.alone:
            return ""
        return (
            f"attention is {self.name} in every arm, though the baseline alone would take"
            f" {self.alone}: {'; '.join(self.against)}"
        )


def shared_attention(
    recipes: Mapping[str, Recipe], registry: Registry, device: torch.device
) -> Shared | None:
    """The first backend that the baseline's "auto" prefers and every arm with the same "auto" can
    use; None where the baseline (the first) names its backend. Raises Incompatible, with what
    stands against each, if there is none.
    """
    baseline, *_ = recipes.values()
    auto = automatic(baseline)
    if auto is None:
        return None
    arms = {name: recipe for name, recipe in recipes.items() if automatic(recipe) == auto}
    needs = {name: needed(recipe, registry, device) for name, recipe in arms.items()}
    first, *_ = needs
    alone, against = None, list[str]()
    for backend in auto.options["prefer"]:
        candidate = Chosen(
            "attention", "attention", backend, registry.find("attention", backend), {}
        )
        refused = {
            name: why
            for name in arms
            if (why := refusal(candidate, arms[name], needs[name], registry))
        }
        if alone is None and first not in refused:
            alone, against = backend, []
        if not refused and alone is not None:
            return Shared(
                backend,
                alone,
                tuple(against),
                {name: words(recipe, backend) for name, recipe in arms.items()},
            )
        against += [
            f"arm {name} cannot take {backend}: {why}" for name, why in list(refused.items())[:1]
        ]
    raise Incompatible(
        "no attention backend that attention.use = 'auto' prefers serves every arm:\n  "
        + "\n  ".join(against)
    )


def automatic(recipe: Recipe) -> Chosen | None:
    """The recipe's "auto", of whatever layers; None if it names its backends."""
    return next((chosen for chosen in recipe.every("attention") if chosen.name == AUTO.name), None)


def needed(recipe: Recipe, registry: Registry, device: torch.device) -> list[AttentionRequirements]:
    """What the recipe's attention must be able to do, in the recipe's precision."""
    return attention_requirements(
        recipe, registry, device, Precision.choose(recipe.train.precision, device).dtype
    )


def refusal(
    candidate: Chosen, recipe: Recipe, needs: list[AttentionRequirements], registry: Registry
) -> str:
    """Why a backend cannot serve a recipe; empty if it can."""
    try:
        check_backend(registry, candidate, dims_of(recipe), needs)
    except Incompatible as error:
        return str(error.__cause__ or error)
    return ""


def words(recipe: Recipe, backend: str) -> tuple[str, ...]:
    """Overrides that leave every "auto" one choice."""
    return tuple(
        f'{table}.prefer=["{backend}"]' for table in recipe.tables_with("attention", AUTO.name)
    )
