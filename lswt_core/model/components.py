"""Instances of a recipe's components."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lswt_core.device import allow_two_backward_passes
from lswt_core.distributed.world import spread_rows
from lswt_core.errors import Incompatible, PluginError
from lswt_core.interfaces import (
    AuxiliaryLoss,
    CrossEntropy,
    Dims,
    Horizon,
    Memory,
    Optimizer,
    PositionalEncoding,
    Schedule,
    Unsupported,
)
from lswt_core.model.parameters import parameter_groups
from lswt_core.model.spec import dimensions as sizes
from lswt_core.recipe import Chosen, Recipe
from lswt_core.registry import Registry


def create(registry: Registry, chosen: Chosen, *given: Any) -> Any:
    """One component, from its class and options."""
    try:
        return registry.load(chosen.offer)(*given, **chosen.options)
    except (Unsupported, ValueError) as error:
        raise Incompatible(
            f"[{chosen.table}] {chosen.name} ({chosen.offer.distribution} {chosen.offer.version}):"
            f" {error}"
        ) from error
    except TypeError as error:
        if registry.culprit(error) is not None:
            raise
        raise PluginError(  # its constructor could not even be called
            f"[{chosen.table}] {chosen.name} ({chosen.offer.distribution} {chosen.offer.version})"
            f" cannot be built: {error}"
        ) from error


def cross_entropy(recipe: Recipe, registry: Registry) -> CrossEntropy:
    """How the recipe scores states against the vocabulary, wherever that may run."""
    scoring: CrossEntropy = create(registry, recipe.one("cross_entropy"))
    return scoring


def auxiliary_losses(recipe: Recipe, registry: Registry) -> dict[str, tuple[AuxiliaryLoss, float]]:
    """The losses beside cross-entropy, with their weights, on torch's default device."""
    dims = dimensions(recipe)
    return {
        name: (create(registry, chosen, dims), chosen.weight)
        for name, chosen in recipe.many("loss").items()
    }


def dimensions(recipe: Recipe) -> Dims:
    """The sizes components are built for."""
    return sizes(recipe.resolved()["model"])


def encodings(recipe: Recipe, registry: Registry) -> list[PositionalEncoding]:
    """The positional encodings of the recipe, without memory; raises Incompatible if one cannot be
    used for single layers.
    """
    with torch.device("meta"):
        made: list[PositionalEncoding] = [
            create(registry, chosen, dimensions(recipe)) for chosen in recipe.every("positional")
        ]
    for encoding in made[1:]:
        if type(encoding).embed is not PositionalEncoding.embed:
            raise Incompatible(
                f"positional encoding {encoding.name!r} adds to the model's input, which all layers"
                " share: it cannot be used for some of them; name it in [positional]"
            )
    return made


def memories_of(recipe: Recipe, registry: Registry) -> list[Memory]:
    """The memories of the recipe, of whatever layers, without memory of their own."""
    with torch.device("meta"):
        return [create(registry, chosen, dimensions(recipe)) for chosen in recipe.every("memory")]


def optimizer_class(recipe: Recipe, registry: Registry) -> type[Optimizer]:
    """The class of the optimizer the recipe names."""
    return registry.load(recipe.one("optimizer").offer)


def build_optimizer(recipe: Recipe, registry: Registry, loss: nn.Module) -> Optimizer:
    """The optimizer over the model's trainable parameters."""
    optimizer: Optimizer = create(registry, recipe.one("optimizer"), parameter_groups(loss))
    # refuses here what the first refresh would refuse
    spread_rows(optimizer.fraction, recipe.train.batch_size)
    if optimizer.shares_forward:
        allow_two_backward_passes()
    return optimizer


def build_schedule(recipe: Recipe, registry: Registry) -> Schedule:
    """The learning rate's course over the run."""
    train = recipe.train
    horizon = Horizon(
        train.total_steps, train.tokens_per_step, train.tokens if train.steps is None else None
    )
    return create(registry, recipe.one("schedule"), horizon)
