"""What a recipe would take, measured on the meta device: parameters, memory, floating-point
operations. Nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from lswt_core.budget.flops import Flops, forward_flops, train_flops, without_auxiliary
from lswt_core.budget.layers import Amounts, by_layers
from lswt_core.budget.memory import (
    Memory,
    batch_bytes,
    blank,
    logits_bytes,
    optimizer_bytes,
    parameter_bytes,
    warm_state,
)
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import LswtError
from lswt_core.interfaces import Batch, Optimizer
from lswt_core.model.build import build_decoder_spec
from lswt_core.model.components import build_auxiliary_losses, build_cross_entropy, build_optimizer
from lswt_core.model.parameters import count_parameters
from lswt_core.model.spec import DecoderSpec
from lswt_core.model.train_module import TrainModule
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

PASSES, STATE = "work, memories and activations", "the optimizer's state"


class Budget(NamedTuple):
    """What a recipe takes."""

    parameters: dict[str, int]  # by component
    trainable: dict[str, int]  # by component
    flops: Flops | None  # None: unknown
    memory: Memory
    unknown: dict[str, str]  # what cannot be measured without numbers, and why

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def flops_per_token(self) -> int | None:
        """A token's share of training, curvature included; None: unknown."""
        return None if self.flops is None else self.flops.train + self.flops.update_curvature


def budget(recipe: Recipe, registry: Registry, world: World) -> Budget:
    """Measure a recipe; exact for layers of one make (``by_layers``)."""
    precision = Precision.choose(recipe.train.precision, world.device)
    blueprint = build_decoder_spec(recipe, registry, device=world.device, dtype=precision.dtype)
    unknown: dict[str, str] = {}
    found = by_layers(
        recipe, blueprint, lambda shallow: measure(shallow, recipe, registry, precision, unknown)
    )
    table = torch.empty(
        blueprint.vocab_size, blueprint.d_vocab, device="meta", requires_grad=blueprint.trainable
    )
    logits = partial(
        logits_bytes,
        build_cross_entropy(recipe, registry),
        world.device.type,
        table,
        precision.dtype.itemsize,
    )
    memory = Memory(named(found, "bytes: "), recipe, logits)
    flops = None if PASSES in unknown else flops_of(found, recipe.train.seq_len)
    return Budget(named(found, "parameters: "), named(found, "trainable: "), flops, memory, unknown)


def flops_of(found: Amounts, tokens: int) -> Flops:
    """A token's share of the FLOPs that were found for a row."""
    parameters = named(found, "parameters: ")
    forward = {place: amount // tokens for place, amount in named(found, "forward: ").items()}
    return Flops(
        forward=forward,
        train=found["train"] // tokens,
        update_curvature=found["refresh"] // tokens,
        conventional=3 * sum(forward.values()),
        six_n=6 * (sum(parameters.values()) - parameters.get("embedding", 0)),
    )


def named(found: Amounts, prefix: str) -> Amounts:
    """The amounts whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): amount
        for name, amount in found.items()
        if name.startswith(prefix)
    }


def measure(
    blueprint: DecoderSpec,
    recipe: Recipe,
    registry: Registry,
    precision: Precision,
    unknown: dict[str, str],
) -> Amounts:
    """Everything that is a sum over layers, of a model and one row of its context. What a component
    cannot do without numbers is absent, and ``unknown`` says why.
    """
    with torch.device("meta"):
        loss = TrainModule(
            blueprint.build(),
            build_auxiliary_losses(recipe, registry),
            build_cross_entropy(recipe, registry),
        )
    optimizer, half = build_optimizer(recipe, registry, loss), precision.dtype.itemsize
    counted = count_parameters(loss)
    found = {
        **{f"parameters: {owner}": number for owner, number in counted["by_component"].items()},
        **{
            f"trainable: {owner}": number
            for owner, number in counted["trainable_by_component"].items()
        },
        **{
            f"bytes: {name}": number
            for name, number in parameter_bytes(loss, optimizer, half).items()
        },
    }

    def state() -> Amounts:
        return {"bytes: optimizer": optimizer_bytes(optimizer)}

    def passes() -> Amounts:
        return pass_amounts(loss, optimizer, blank(1, recipe.train.seq_len), half)

    return found | known(STATE, state, registry, unknown) | known(PASSES, passes, registry, unknown)


def known(
    what: str, function: Callable[[], Amounts], registry: Registry, unknown: dict[str, str]
) -> Amounts:
    """What a function finds; nothing, and why, where a plugin cannot run without numbers, such as
    one that looks at values.
    """
    try:
        return function()
    except LswtError:
        raise
    except Exception as error:
        found = registry.culprit(error)
        if found is None:
            raise
        unknown[what] = f"it cannot be measured without numbers: {found}"
        return {}


def pass_amounts(loss: TrainModule, optimizer: Optimizer, batch: Batch, half: int) -> Amounts:
    """What reading a batch takes, forward and backward."""
    state = warm_state(loss, batch)
    plain, backward = train_flops(without_auxiliary(loss), batch, state)
    return {
        **{
            f"forward: {place}": number
            for place, number in forward_flops(loss, batch, state).items()
        },
        "train": train_flops(loss, batch, state)[0] if loss.auxiliary else plain,
        "refresh": refresh_flops(optimizer, plain, backward),
        **{
            f"bytes: {name}": number
            for name, number in batch_bytes(loss, batch, state, half).items()
        },
    }


def refresh_flops(optimizer: Optimizer, gradient: int, backward: int) -> int:
    """A step's share of what a second-order optimizer computes besides: a gradient, of which a
    shared forward pass leaves the ``backward`` pass; a Hessian-vector product is two gradients.
    """
    if not optimizer.hessian_update_interval:
        return 0
    found = (
        backward
        if optimizer.shares_forward
        else (2 if optimizer.needs_hessian_vector_products else 1) * gradient
    )
    return round(found * optimizer.fraction / optimizer.hessian_update_interval)
