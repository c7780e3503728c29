"""What a recipe would take, measured on the meta device: parameters, memory, floating-point operations. Nothing is allocated."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from lswt_core.assemble import assemble_blueprint, auxiliary_losses, build_optimizer, count_parameters, cross_entropy
from lswt_core.blueprint import Blueprint
from lswt_core.budget.flops import Flops, forward_flops, train_flops, without_auxiliary
from lswt_core.budget.layers import by_layers
from lswt_core.budget.memory import Memory, amounts, blank, logits_bytes, warm_state
from lswt_core.interfaces import Optimizer
from lswt_core.loss import Loss
from lswt_core.parallel import Precision, World
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry


class Budget(NamedTuple):
    """What a recipe takes."""

    parameters: dict[str, int]  # by component
    trainable: dict[str, int]  # by component
    flops: Flops
    memory: Memory

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def flops_per_token(self) -> int:
        """A token's share of training, curvature included."""
        return self.flops.train + self.flops.refresh


def budget(recipe: Recipe, registry: Registry, world: World) -> Budget:
    """Measure a recipe; exact for layers of one make (``by_layers``)."""
    precision = Precision.choose(recipe.train.precision, world.device)
    blueprint = assemble_blueprint(recipe, registry, device=world.device, dtype=precision.dtype)
    found = by_layers(recipe, blueprint, lambda shallow: measure(shallow, recipe, registry, precision))
    tokens = recipe.train.context

    def named(prefix: str) -> dict[str, int]:
        return {name.removeprefix(prefix): amount for name, amount in found.items() if name.startswith(prefix)}

    parameters, forward = named("parameters: "), {place: amount // tokens for place, amount in named("forward: ").items()}
    flops = Flops(
        forward=forward,
        train=found["train"] // tokens,
        refresh=found["refresh"] // tokens,
        conventional=3 * sum(forward.values()),
        six_n=6 * (sum(parameters.values()) - parameters.get("embedding", 0)),
    )
    table = torch.empty(blueprint.vocab_size, blueprint.d_vocab, device="meta", requires_grad=blueprint.trainable)
    logits = partial(logits_bytes, cross_entropy(recipe, registry), world.device.type, table, precision.dtype.itemsize)
    return Budget(parameters, named("trainable: "), flops, Memory(named("bytes: "), recipe, logits))


def measure(blueprint: Blueprint, recipe: Recipe, registry: Registry, precision: Precision) -> dict[str, int]:
    """Everything that is a sum over layers, of a model and one row of its context."""
    with torch.device("meta"):
        loss = Loss(blueprint.build(), auxiliary_losses(recipe, registry), cross_entropy(recipe, registry))
    optimizer = build_optimizer(recipe, registry, loss)
    batch = blank(1, recipe.train.context)
    state = warm_state(loss, batch)
    plain, backward = train_flops(without_auxiliary(loss), batch, state)
    counted = count_parameters(loss)
    return {
        **{f"parameters: {owner}": number for owner, number in counted["by_component"].items()},
        **{f"trainable: {owner}": number for owner, number in counted["trainable_by_component"].items()},
        **{f"forward: {place}": number for place, number in forward_flops(loss, batch, state).items()},
        "train": train_flops(loss, batch, state)[0] if loss.auxiliary else plain,
        "refresh": refresh_flops(optimizer, plain, backward),
        **{f"bytes: {name}": number for name, number in amounts(loss, optimizer, batch, state, precision.dtype.itemsize).items()},
    }


def refresh_flops(optimizer: Optimizer, gradient: int, backward: int) -> int:
    """A step's share of what a second-order optimizer computes besides: a gradient, of which a shared forward pass leaves the
    ``backward`` pass; a Hessian-vector product is two gradients.
    """
    if not optimizer.refresh_every:
        return 0
    found = backward if optimizer.shares_forward else (2 if optimizer.takes_hessian_vectors else 1) * gradient
    return round(found * optimizer.fraction / optimizer.refresh_every)
