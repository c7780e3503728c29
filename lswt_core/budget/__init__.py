"""What a recipe takes, measured on the meta device without allocating: parameters, peak memory,
FLOPs per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from lswt_core.budget.batch_memory import batch_bytes, meta_batch, warm_state
from lswt_core.budget.flops import Flops, forward_flops, train_flops, without_auxiliary
from lswt_core.budget.layers import Amounts, extrapolate_layers
from lswt_core.budget.memory import (
    MemoryBudget,
    average_bytes,
    logits_bytes,
    optimizer_states,
    parameter_bytes,
)
from lswt_core.budget.rank_model import RankModel, by_shape, units_of
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import LswtError
from lswt_core.interfaces import Batch, Optimizer
from lswt_core.model.build import build_decoder_spec
from lswt_core.model.compatibility import stream_width
from lswt_core.model.components import (
    build_auxiliary_losses,
    build_average,
    build_cross_entropy,
    build_optimizer,
    optimizer_class,
)
from lswt_core.model.parameters import count_parameters
from lswt_core.model.spec import DecoderSpec
from lswt_core.model.train_module import TrainModule
from lswt_core.recipe import Recipe
from lswt_core.recipe.schema import Train
from lswt_core.registry import Registry

# meta tensors have shapes and no values
REMEDY = (
    "; it can be if no shape and no branch depends on values: no .item(), nonzero or x[mask], but"
    " where, sort, cumsum or scatter_add, whose shapes are fixed"
)
# what can be unknown, as keys of Budget.unknown
PASSES, OPTIMIZER_STATE = "FLOPs, memories and activations", "optimizer state"


class Budget(NamedTuple):
    """What a recipe takes."""

    parameters: dict[str, int]  # by component
    trainable: dict[str, int]  # by component
    flops: Flops | None  # per token; None: unknown
    memory: MemoryBudget
    active: int  # number of parameters that a token uses
    unknown: dict[str, str]  # what cannot be measured on the meta device -> why

    @property
    def total(self) -> int:
        """Number of parameters."""
        return sum(self.parameters.values())

    @property
    def flops_per_token(self) -> int | None:
        """Training FLOPs per token, the optimizer's included; None: unknown."""
        if self.flops is None:
            return None
        return self.flops.train + self.flops.update_curvature + self.flops.optimizer


def budget(
    recipe: Recipe, registry: Registry, world: World, *, device_type: str | None = None
) -> Budget:
    """Measure a recipe; exact if equal layers need the same (``extrapolate_layers``).

    ``device_type`` is that of the device whose memory is planned; None: ``world``'s.
    """
    device_type = device_type or world.device.type
    precision = Precision.choose(recipe.train.precision, world.device)
    blueprint = build_decoder_spec(recipe, registry, device=world.device, dtype=precision.dtype)
    unknown: dict[str, str] = {}

    def measure_layers(shallow: DecoderSpec) -> Amounts:
        return measure(shallow, recipe, registry, precision, unknown)

    amounts = extrapolate_layers(recipe, blueprint, measure_layers)
    logits = partial(
        logits_bytes,
        build_cross_entropy(recipe, registry),
        device_type,
        output_table(blueprint),
        precision.dtype.itemsize,
    )
    return Budget(
        parameters=strip_prefix(amounts, "parameters: "),
        trainable=strip_prefix(amounts, "trainable: "),
        flops=None if PASSES in unknown else flops_per_token(amounts, recipe.train),
        memory=MemoryBudget(
            strip_prefix(amounts, "bytes: "),
            recipe,
            logits,
            measure_stream(blueprint),
            rank_model(recipe, registry, blueprint, precision, amounts),
            has_host=device_type != "cpu",
        ),
        active=sum(strip_prefix(amounts, "parameters: ").values()) - amounts["inactive"],
        unknown=unknown,
    )


def rank_model(
    recipe: Recipe,
    registry: Registry,
    blueprint: DecoderSpec,
    precision: Precision,
    amounts: Amounts,
) -> RankModel:
    """What several ranks share: all parameters, which are counted one by one."""
    with torch.device("meta"):
        losses = build_auxiliary_losses(recipe, registry)
        loss = TrainModule(blueprint.build(), losses, build_cross_entropy(recipe, registry))
    optimizer = optimizer_class(recipe, registry)
    half = precision.dtype.itemsize
    # as runs choose it: differences of gradients drown in the rounding of bfloat16
    in_half = precision.dtype == torch.bfloat16 and not optimizer.needs_hessian_vector_products
    return RankModel(
        *units_of(loss),
        alike=by_shape(strip_prefix(amounts, "alike: ")),
        beside=by_shape(strip_prefix(amounts, "beside: ")),
        gathered=half if in_half else None,
        half=half,
        updates_matrices=optimizer.unit == "matrix",
    )


def output_table(blueprint: DecoderSpec) -> torch.Tensor:
    """The LM head's table [V, d_vocab] on the meta device."""
    with torch.device("meta"):
        has_own_table = blueprint.head(blueprint.dims).output_layer() is not None
    return torch.empty(
        (blueprint.dims.vocab_size, blueprint.dims.d_vocab),
        device="meta",
        requires_grad=blueprint.trainable or has_own_table,
    )


def measure_stream(blueprint: DecoderSpec) -> int:
    """Return how many numbers of a token the residual stream has."""
    with torch.device("meta"):
        return stream_width(blueprint.layers[0].build(blueprint.dims), blueprint.dims.d_model)


def flops_per_token(amounts: Amounts, train: Train) -> Flops:
    """Divide the FLOPs measured for a sequence, and for an update."""
    tokens = train.seq_len
    parameters = strip_prefix(amounts, "parameters: ")
    active = sum(parameters.values()) - amounts["inactive"]
    forward = {
        part: amount // tokens for part, amount in strip_prefix(amounts, "forward: ").items()
    }
    return Flops(
        forward=forward,
        train=amounts["train"] // tokens,
        update_curvature=amounts["update_curvature"] // tokens,
        optimizer=amounts.get("optimizer_step", 0) // train.tokens_per_step,
        conventional=3 * sum(forward.values()),
        six_n=6 * (active - parameters.get("embedding", 0)),
    )


def add_prefix(amounts: Amounts, prefix: str) -> Amounts:
    """Return amounts with a prefix before their names."""
    return {prefix + name: amount for name, amount in amounts.items()}


def strip_prefix(amounts: Amounts, prefix: str) -> Amounts:
    """Return the amounts whose names have a prefix, without it."""
    return {
        name.removeprefix(prefix): amount
        for name, amount in amounts.items()
        if name.startswith(prefix)
    }


def measure(
    blueprint: DecoderSpec,
    recipe: Recipe,
    registry: Registry,
    precision: Precision,
    unknown: dict[str, str],
) -> Amounts:
    """Measure a model on one sequence: all amounts that are sums over layers. What a component
    cannot compute on the meta device is absent, and ``unknown`` says why.
    """
    with torch.device("meta"):
        loss = TrainModule(
            blueprint.build(),
            build_auxiliary_losses(recipe, registry),
            build_cross_entropy(recipe, registry),
        )
    optimizer, half = build_optimizer(recipe, registry, loss), precision.dtype.itemsize
    counted = count_parameters(loss)

    def measure_optimizer() -> Amounts:
        with FlopCounterMode(display=False) as counter:
            states = optimizer_states(optimizer)
        size, work = sum(states.values()), counter.get_total_flops()
        return {"bytes: optimizer": size, "optimizer_step": work, **states}

    def measure_passes() -> Amounts:
        return pass_amounts(loss, optimizer, meta_batch(1, recipe.train.seq_len), half)

    return (
        add_prefix(counted["by_component"], "parameters: ")
        | add_prefix(counted["trainable_by_component"], "trainable: ")
        | {"inactive": sum(layer.inactive_parameters for layer in loss.decoder.layers())}
        | add_prefix(parameter_bytes(loss, optimizer, half), "bytes: ")
        | add_prefix(average_bytes(loss, build_average(recipe, registry)), "bytes: ")
        | measure_if_possible(OPTIMIZER_STATE, measure_optimizer, registry, unknown)
        | measure_if_possible(PASSES, measure_passes, registry, unknown)
    )


def measure_if_possible(
    subject: str, function: Callable[[], Amounts], registry: Registry, unknown: dict[str, str]
) -> Amounts:
    """Return a function's amounts; {} and a reason in ``unknown`` if a plugin fails on the meta
    device, for example because it reads values.
    """
    try:
        return function()
    except LswtError:
        raise
    except Exception as error:
        culprit = registry.culprit(error)
        if culprit is None:
            raise
        unknown[subject] = f"cannot be measured on the meta device: {culprit}{REMEDY}"
        return {}


def pass_amounts(loss: TrainModule, optimizer: Optimizer, batch: Batch, half: int) -> Amounts:
    """Measure the forward and backward pass of a batch."""
    state = warm_state(loss, batch)
    train, backward = train_flops(without_auxiliary(loss), batch, state)
    curvature = curvature_flops(optimizer, train, backward)
    if loss.auxiliary:
        train, _ = train_flops(loss, batch, state)
    return {
        **add_prefix(forward_flops(loss, batch, state), "forward: "),
        "train": train,
        "update_curvature": curvature,
        **add_prefix(batch_bytes(loss, batch, state, half), "bytes: "),
    }


def curvature_flops(optimizer: Optimizer, gradient: int, backward: int) -> int:
    """Return the FLOPs of a second-order optimizer's Hessian estimate, averaged over steps: one
    gradient, of which only the ``backward`` pass remains if the forward pass is shared; a
    Hessian-vector product costs two gradients.
    """
    if not optimizer.hessian_update_interval:
        return 0
    if optimizer.shares_forward:
        cost = backward
    elif optimizer.needs_hessian_vector_products:
        cost = 2 * gradient
    else:
        cost = gradient
    return round(cost * optimizer.fraction / optimizer.hessian_update_interval)
