"""Gradients of a step: their reduction over data-parallel ranks, and those against sampled labels
that share the forward pass of the training loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from lswt_core.distributed.world import World
from lswt_core.interfaces import Objective
from lswt_core.plugin_api.sharded_tensor import local_tensors
from lswt_core.train.finite import require_finite
from lswt_core.train.hvp import swapped_gradients


def finish_gradients(parameters: Sequence[nn.Parameter], loss_scale: float) -> list[Tensor]:
    """Divide accumulated gradients by the loss scale, in place, and give parameters that have none
    a zero; returns the piece of each that this rank holds.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients = local_tensors([p.grad for p in parameters if p.grad is not None])
    if loss_scale != 1:
        torch._foreach_mul_(gradients, 1 / loss_scale)
    return gradients


class SampledGradient:
    """The gradient against labels sampled from the model, accumulated over micro-batches during the
    backward pass of the training loss.
    """

    def __init__(
        self, world: World, parameters: Sequence[nn.Parameter], count: Tensor, loss_scale: float
    ) -> None:
        """``count``: number of sampled labels over all micro-batches and ranks, []."""
        self.world, self.parameters = world, parameters
        self.count, self.loss_scale = count, loss_scale
        self.gradients: list[Tensor | None] = [None] * len(parameters)

    def accumulate(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; its graph is retained for the training loss. By a backward
        pass: ``torch.autograd.grad`` finds nothing where parameters are sharded.
        """
        with swapped_gradients(self.parameters, self.gradients) as accumulated:
            loss.backward(retain_graph=True)
            self.gradients = accumulated()

    def move_to_parameters(self) -> None:
        """Move the accumulated gradient into every ``p.grad``. Raises NotFinite."""
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        self.gradients = []
        require_finite(self.world, finish_gradients(self.parameters, self.loss_scale))


class SharedForward:
    """A fraction of a step's rows, whose sampled gradient was accumulated already (implements
    ``interfaces.Objective``). Everything else is computed with a forward pass of its own.
    """

    def __init__(self, step: Objective, fraction: float, gradient: SampledGradient) -> None:
        self.step, self.fraction, self.gradient = step, fraction, gradient

    @cached_property
    def tokens(self) -> int:
        """The number of sampled labels. Synchronises with the device."""
        return int(self.gradient.count)

    def backward(self, labels: Literal["data", "sampled"]) -> None:
        """See Objective; the sampled gradient can be had once. Raises NotFinite ("sampled")."""
        if labels == "sampled":
            self.gradient.move_to_parameters()
        else:
            self.step.subset(self.fraction).backward(labels)

    def hessian_vector_product(
        self, params: Sequence[Tensor], vectors: Sequence[Tensor]
    ) -> list[Tensor]:
        """See Objective. Raises NotFinite."""
        return self.step.subset(self.fraction).hessian_vector_product(params, vectors)

    def generator(self, purpose: str) -> torch.Generator:
        """See Objective."""
        return self.step.generator(purpose)

    def subset(self, fraction: float) -> SharedForward:
        """Itself; the fraction was fixed before the forward pass."""
        assert fraction == self.fraction
        return self
