"""From a recipe to a model: components are checked against each other, wired on the meta device,
and given memory last.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from lswt_core.device import compile_each, compiles
from lswt_core.errors import Incompatible
from lswt_core.interfaces import (
    Unsupported,
)
from lswt_core.model.attention_choice import Backends, suitable_attention
from lswt_core.model.components import auxiliary_losses, create, cross_entropy
from lswt_core.model.initialise import initialise
from lswt_core.model.spec import Blueprint, Builder
from lswt_core.model.train_module import TrainModule
from lswt_core.recipe import Chosen, Recipe
from lswt_core.registry import AUTO, Registry


class Assembled(NamedTuple):
    """A model without memory yet, and what was decided on the way."""

    loss: TrainModule
    backends: tuple[str, ...]  # of attention; several where layers differ
    notes: tuple[str, ...]  # why it is that one

    @property
    def attention(self) -> str:
        """The backends' names."""
        return ", ".join(self.backends)


def assemble(
    recipe: Recipe, registry: Registry, *, device: torch.device, dtype: torch.dtype
) -> Assembled:
    """Build decoder and losses on the meta device; every "does A go with B" question is settled
    here.
    """
    with torch.device("meta"):
        backends = suitable_attention(recipe, registry, device, dtype)
        decoder = blueprint(recipe, registry, backends).build()
        decoder.activation_checkpointing = recipe.train.activation_checkpointing == "block"
        scoring = cross_entropy(recipe, registry)
        try:
            scoring.require(device.type)
        except Unsupported as error:
            raise Incompatible(
                f"[cross_entropy] {scoring.name} cannot be used here: {error}"
            ) from error
        return Assembled(
            TrainModule(decoder, auxiliary_losses(recipe, registry), scoring),
            backends.names,
            backends.notes,
        )


def assemble_blueprint(
    recipe: Recipe, registry: Registry, *, device: torch.device, dtype: torch.dtype
) -> Blueprint:
    """What the recipe's decoder is built from, with the attention backend that suits the device."""
    return blueprint(recipe, registry, suitable_attention(recipe, registry, device, dtype))


def blueprint(recipe: Recipe, registry: Registry, backends: Backends) -> Blueprint:
    """What the recipe's decoder is built from, with the attention backends that were chosen for it."""
    backend = {"use": backends.automatic.name, **backends.automatic.options}

    def builder(kind: str, table: Mapping[str, Any]) -> Builder:
        options = dict(backend if (kind, table["use"]) == ("attention", AUTO.name) else table)
        name = options.pop("use")
        return partial(
            create, registry, Chosen(kind, kind, name, registry.find(kind, name), options)
        )

    return Blueprint.from_tables(recipe.resolved(), builder)


def materialise(loss: TrainModule, recipe: Recipe, device: torch.device) -> None:
    """Give the model memory on the device and every parameter its initial value; nothing of it is
    compiled before its first call.
    """
    loss.to_empty(device=device)
    initialise(loss, seed=recipe.train.seed, std=recipe.model.init_std)
    if compiles(recipe.train.compile, device):
        compile_each(loss.decoder.blocks)
        if loss.cross_entropy is not None:
            loss.cross_entropy.compile_kernels()
