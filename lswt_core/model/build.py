"""Build a model from a recipe: check components against each other, assemble them on the meta
device, then allocate and initialise parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from lswt_core.device import compile_blocks, should_compile
from lswt_core.errors import Incompatible
from lswt_core.interfaces import Component, CrossEntropy, Dims, Head, Scaling, Unsupported
from lswt_core.model.attention_choice import AttentionChoice, choose_backends
from lswt_core.model.compatibility import (
    check_carry,
    check_names,
    check_parts,
    check_projections,
    check_replay,
    check_streams,
)
from lswt_core.model.components import (
    build_auxiliary_losses,
    build_component,
    build_cross_entropy,
    build_losses_for,
    dims_of,
)
from lswt_core.model.initialise import initialise
from lswt_core.model.parametrise import compute_scalings, scale_initial_values
from lswt_core.model.spec import Builder, DecoderSpec, LayerSpec
from lswt_core.model.train_module import TrainModule
from lswt_core.recipe import Chosen, Recipe
from lswt_core.registry import AUTO, Registry


class BuiltModel(NamedTuple):
    """A model on the meta device, and which attention backends it got."""

    loss: TrainModule
    backends: tuple[str, ...]  # attention backends; several where layers differ
    notes: tuple[str, ...]  # why these backends

    @property
    def attention(self) -> str:
        """The backends' names, separated by commas."""
        return ", ".join(self.backends)


def build_model(
    recipe: Recipe, registry: Registry, *, device: torch.device, dtype: torch.dtype
) -> BuiltModel:
    """Build decoder and losses on the meta device, to run on ``device`` in ``dtype``. Raises
    Incompatible if components do not go together, or not with the device.
    """
    check_names(recipe)
    check_parts(recipe, registry)
    with torch.device("meta"):
        choice = choose_backends(recipe, registry, device, dtype)
        decoder = decoder_spec(recipe, registry, choice).build()
        check_carry(decoder)
        check_projections(decoder, recipe.model.d_model)
        check_streams(decoder, recipe.model.d_model)
        check_replay(decoder, recipe)
        decoder.activation_checkpointing = recipe.train.activation_checkpointing == "block"
        cross_entropy = build_cross_entropy(recipe, registry)
        check_cross_entropy(cross_entropy, decoder.vocabulary, device)
        losses = build_auxiliary_losses(recipe, registry)
        scalings = scalings_of(recipe, registry, choice)
        loss = TrainModule(decoder, losses, cross_entropy, scalings)
        return BuiltModel(loss, choice.names, choice.notes)


def check_cross_entropy(cross_entropy: CrossEntropy, head: Head, device: torch.device) -> None:
    """Raise Incompatible if a cross-entropy cannot run on a device, or not with the head."""
    refused = f"[cross_entropy] {cross_entropy.name} cannot be used here"
    try:
        cross_entropy.require(device.type)
    except Unsupported as error:
        raise Incompatible(f"{refused}: {error}") from error
    if head.soft_cap is not None and not cross_entropy.takes_soft_cap:
        raise Incompatible(
            f"{refused}: head {head.name!r} caps logits at {head.soft_cap:g}, which it does not"
            ' compute (takes_soft_cap); choose cross_entropy.use = "chunked"'
        )


def scalings_of(recipe: Recipe, registry: Registry, choice: AttentionChoice) -> dict[str, Scaling]:
    """The factors that the recipe's parametrisation gives to parameters, by name."""
    parametrisation = build_component(registry, recipe.one("parametrisation"))
    spec = decoder_spec(recipe, registry, choice)

    def build(dims: Dims) -> TrainModule:
        losses = build_losses_for(recipe, registry, dims)
        return TrainModule(spec._replace(dims=dims).build(), losses)

    return compute_scalings(parametrisation, spec.dims, build)


def build_decoder_spec(
    recipe: Recipe, registry: Registry, *, device: torch.device, dtype: torch.dtype
) -> DecoderSpec:
    """Return the specification of the recipe's decoder, "auto" resolved for the device."""
    return decoder_spec(recipe, registry, choose_backends(recipe, registry, device, dtype))


def decoder_spec(recipe: Recipe, registry: Registry, choice: AttentionChoice) -> DecoderSpec:
    """Return the specification of the recipe's decoder, with the attention backends chosen."""

    def builder(chosen: Chosen) -> Builder:
        if (chosen.kind, chosen.name) == ("attention", AUTO.name):
            chosen = choice.automatic
        return partial(build_component, registry, chosen)

    def layer(components: Mapping[str, Mapping[str, Chosen]]) -> LayerSpec:
        positional = components["positional"]["positional"]
        return LayerSpec(
            block=builder(components["block"]["block"]),
            mixer=builder(components["mixer"]["mixer"]),
            positional=builder(positional),
            has_own_positional=positional != recipe.one("positional"),
            memories={name: builder(one) for name, one in components["memory"].items()},
            attention=builder(components["attention"]["attention"]),
            qk_norm=builder(components["qk_norm"]["qk_norm"]),
            ffn=builder(components["ffn"]["ffn"]),
            norm=builder(components["norm"]["norm"]),
        )

    dims = dims_of(recipe)
    return DecoderSpec(
        dims=dims,
        trainable=recipe.embedding.trainable,
        head=builder(recipe.one("head")),
        positional=builder(recipe.one("positional")),
        norm=builder(recipe.one("norm")),
        layers=tuple(layer(recipe.at_layer(number)) for number in range(dims.n_layers)),
    )


def materialise(
    loss: TrainModule,
    recipe: Recipe,
    device: torch.device,
    shard: Callable[[nn.Module], None] | None = None,
) -> None:
    """Move the model from the meta device to ``device`` and initialise every parameter; blocks
    are marked to be compiled at their first call where ``train.compile`` says so.

    Block by block: ``shard`` is called with each once it has its values, and with the whole at
    last, so that no device ever holds more than one block whole.
    """
    blocks = list(loss.decoder.blocks)
    in_blocks = {part for block in blocks for part in block.modules()}
    for i, block in enumerate(blocks):
        block.to_empty(device=device)
        give_values(loss, block, recipe, f"decoder.blocks.{i}")
        if shard is not None:
            shard(block)
    for module in loss.modules():
        if module not in in_blocks:
            module.to_empty(device=device, recurse=False)
    give_values(loss, loss, recipe, without=blocks)
    if shard is not None:
        shard(loss)
    if should_compile(recipe.train.compile, device):
        compile_blocks(loss.decoder.blocks)
        for component in (loss.cross_entropy, *loss.auxiliary.values()):
            if isinstance(component, Component):
                component.compile_kernels()


def give_values(
    loss: TrainModule,
    part: nn.Module,
    recipe: Recipe,
    prefix: str = "",
    without: Sequence[nn.Module] = (),
) -> None:
    """Give a part of the model its initial values, but for the modules ``without``."""
    seed, std = recipe.train.seed, recipe.model.init_std
    initialise(part, seed=seed, std=std, prefix=prefix, without=without)
    left_out = {p for module in without for p in module.parameters()}
    named = part.named_parameters(prefix=prefix)
    scale_initial_values([(name, p) for name, p in named if p not in left_out], loss.scalings)
