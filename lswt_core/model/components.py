"""Instantiate a recipe's components."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lswt_core.device import allow_two_backward_passes, should_compile
from lswt_core.distributed.world import spaced_rows
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
    WeightAverage,
)
from lswt_core.model.parameters import apply_group_factors, build_parameter_groups
from lswt_core.model.spec import Builder, dims_from_tables, fill_components
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.sharded_tensor import is_sharded
from lswt_core.recipe import Chosen, Recipe
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KINDS


def build_component(registry: Registry, chosen: Chosen, *args: Any) -> Any:
    """Instantiate a component as ``cls(*args, **options)``, options that are components included.

    Raises Incompatible, naming its table, if it refuses its options; PluginError if its
    constructor cannot be called so.
    """

    def builder(kind: str, part: Chosen) -> Builder:
        return partial(build_inner, registry, chosen, part)

    options = fill_components(chosen.options, chosen.offer.inner, builder, args)
    package = f"{chosen.offer.distribution} {chosen.offer.version}"
    try:
        return registry.load(chosen.offer)(*args, **options)
    except (Unsupported, ValueError) as error:
        raise Incompatible(f"[{chosen.table}] {chosen.name} ({package}): {error}") from error
    except TypeError as error:
        if registry.culprit(error) is not None:
            raise  # raised within the constructor
        raise PluginError(
            f"[{chosen.table}] {chosen.name} ({package}) cannot be built: {error}"
        ) from error


def build_inner(registry: Registry, owner: Chosen, chosen: Chosen, *args: Any) -> Any:
    """Instantiate a component inside of another one, which may call this itself."""
    given = KINDS[chosen.kind].given
    if len(args) != given:
        package = f"{owner.offer.distribution} {owner.offer.version}"
        raise PluginError(
            f"[{owner.table}] {owner.name} ({package}) builds [{chosen.table}] with {len(args)}"
            f" arguments; a {chosen.kind} component is built with {given}"
        )
    return build_component(registry, chosen, *args)


def build_cross_entropy(recipe: Recipe, registry: Registry) -> CrossEntropy:
    """The recipe's cross-entropy; whether the device supports it is not checked here."""
    cross_entropy: CrossEntropy = build_component(registry, recipe.one("cross_entropy"))
    return cross_entropy


def build_auxiliary_losses(
    recipe: Recipe, registry: Registry
) -> dict[str, tuple[AuxiliaryLoss, float]]:
    """The auxiliary losses and their weights by name, on torch's default device."""
    return build_losses_for(recipe, registry, dims_of(recipe))


def build_losses_for(
    recipe: Recipe, registry: Registry, dims: Dims
) -> dict[str, tuple[AuxiliaryLoss, float]]:
    """The auxiliary losses of a model of other sizes."""
    return {
        name: (build_component(registry, chosen, dims), chosen.weight)
        for name, chosen in recipe.many("loss").items()
    }


def dims_of(recipe: Recipe) -> Dims:
    """The sizes that the recipe's components are built with."""
    return dims_from_tables(recipe.resolved())


def build_encodings(recipe: Recipe, registry: Registry) -> list[PositionalEncoding]:
    """The positional encodings of all layers, on the meta device. Raises Incompatible if one that
    embeds the model's input is used for single layers.
    """
    dims = dims_of(recipe)
    with torch.device("meta"):
        encodings: list[PositionalEncoding] = [
            build_component(registry, chosen, dims) for chosen in recipe.every("positional")
        ]
    for encoding in encodings[1:]:
        if type(encoding).embed is not PositionalEncoding.embed:
            raise Incompatible(
                f"positional encoding {encoding.name!r} adds to the model's input, which all layers"
                " share: it cannot be used for some of them; name it in [positional]"
            )
    return encodings


def build_memories(recipe: Recipe, registry: Registry) -> list[Memory]:
    """The different memories of all layers, on the meta device."""
    dims = dims_of(recipe)
    with torch.device("meta"):
        return [build_component(registry, chosen, dims) for chosen in recipe.every("memory")]


def optimizer_class(recipe: Recipe, registry: Registry) -> type[Optimizer]:
    """The class of the recipe's optimizer."""
    return registry.load(recipe.one("optimizer").offer)


def build_optimizer(recipe: Recipe, registry: Registry, loss: TrainModule) -> Optimizer:
    """The optimizer over the trainable parameters of ``loss``, which may be sharded; its kernels
    are compiled where ``train.compile`` says so.
    """
    groups = build_parameter_groups(loss, recipe.groups, loss.scalings)
    build = partial(build_component, registry, recipe.one("optimizer"))
    optimizer: Optimizer
    is_cut = any(is_sharded(p) for group in groups for p in group["params"])
    if is_cut and optimizer_class(recipe, registry).unit == "matrix":
        from lswt_core.distributed.whole_matrices import WholeMatrices

        optimizer = WholeMatrices(groups, build)
    else:
        optimizer = build(groups)
    apply_group_factors(optimizer)
    # raises now rather than at the first curvature update
    spaced_rows(optimizer.fraction, recipe.train.batch_size)
    if optimizer.shares_forward:
        allow_two_backward_passes()
    device = groups[0]["params"][0].device
    if device.type != "meta" and should_compile(recipe.train.compile, device):
        optimizer.compile_kernels()
    return optimizer


def build_average(recipe: Recipe, registry: Registry) -> WeightAverage:
    """The recipe's average of the weights."""
    average: WeightAverage = build_component(registry, recipe.one("average"))
    return average


def build_schedule(recipe: Recipe, registry: Registry) -> Schedule:
    """The learning-rate schedule over the whole run."""
    train = recipe.train
    tokens = train.tokens if train.steps is None else None
    horizon = Horizon(train.total_steps, train.tokens_per_step, tokens)
    return build_component(registry, recipe.one("schedule"), horizon)
