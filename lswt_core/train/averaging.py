"""An average of the trainable weights beside the weights themselves: updated with them, and put in
their place for evaluation, samples, checkpoints and exports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lswt_core.errors import Incompatible
from lswt_core.interfaces import Optimizer, WeightAverage
from lswt_core.model.components import build_average, optimizer_class
from lswt_core.plugin_api.sharded_tensor import local_tensor, local_tensors
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry


class AveragedWeights:
    """The average of a model's trainable parameters, in float32 or wider."""

    def __init__(self, model: nn.Module, average: WeightAverage) -> None:
        self.average = average
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: widened(p) for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after update number ``step``, the first being 1."""
        rate = self.average.rate(step)
        if rate:
            current = [widened(p) for p in local_tensors(list(self.weights.values()))]
            torch._foreach_lerp_(local_tensors(list(self.averages.values())), current, rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average inside, and the trained weights again afterwards."""
        trained = self.trained_tensors()
        self.copy(self.averages, self.weights)
        try:
            yield
        finally:
            self.copy(trained, self.weights)

    def trained_tensors(self) -> dict[str, Tensor]:
        """Copies of the weights that are trained, by name."""
        return {name: p.detach().clone() for name, p in self.weights.items()}

    def restart(self) -> None:
        """Take the weights as the average."""
        self.copy(self.weights, self.averages)

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """Take what the parameters hold as the average, and ``trained`` as the weights."""
        self.restart()
        self.copy(trained, self.weights)

    @staticmethod
    @torch.no_grad()
    def copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Copy every tensor of ``target`` from the one of its name."""
        for name, tensor in target.items():
            local_tensor(tensor).copy_(local_tensor(source[name]))


def widened(parameter: Tensor) -> Tensor:
    """A detached copy in float32 or wider."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


def average_weights(
    recipe: Recipe, registry: Registry, model: nn.Module, optimizer: Optimizer
) -> AveragedWeights | None:
    """The average of a run; None if its recipe has none. Raises Incompatible if the optimizer keeps
    an average of its own.
    """
    average = build_average(recipe, registry)
    if not average.is_active:
        return None
    if optimizer_class(recipe, registry).eval_parameters is not Optimizer.eval_parameters:
        raise Incompatible(
            f"[average] {average.name}: optimizer {optimizer.name!r} evaluates an average of its"
            " own; leave one of them out, e.g. average.use = none"
        )
    return AveragedWeights(model, average)
