"""Layers and optimizers with one mistake each, which shows where parameters are cut over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.interfaces import Dims, FeedForward, Optimizer
from lswt_core.plugin_api.optimizer import BucketOptimizer
from mutants.expected import CITATION, caught_by
from mutants.layers import TanhLayer
from mutants.optimizers import SignMomentum

CURE: dict[str, str] = {}  # class name -> a word of the message that says what to do


def told(cure: str) -> Any:
    """Register a class that the check "sharding" must catch, and what its message must say."""

    def register(cls: type) -> type:
        CURE[cls.__name__] = cure
        registered: type = caught_by("sharding")(cls)
        return registered

    return register


# ---------- layers


@told("shape [1]")
class ScalarGain(TanhLayer, FeedForward):
    """Has a parameter without dimensions."""

    name = "scalar-gain"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.gain = nn.Parameter(torch.empty(()))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


@told("let one module own it")
class TiedLayers(TanhLayer, FeedForward):
    """Two of its modules have the same parameter."""

    name = "tied-layers"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.second = nn.Linear(dims.d_model, dims.d_model)
        self.second.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(super().forward(x))


@told("attribute 'kept'")
class KeptParameter(TanhLayer, FeedForward):
    """Keeps a parameter in a list, where the core does not see it."""

    name = "kept-parameter"

    def reset_parameters(self) -> None:
        self.kept = [self.fc.weight]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.linear(x, quantised(self.kept[0]))


def quantised(weight: Tensor) -> Tensor:
    """A matrix to two decimals, which gradients do not reach."""
    return (100 * weight.detach()).round() / 100


class Holder:
    """An object that the core does not look into."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


@told("taken earlier")
class HiddenParameter(TanhLayer, FeedForward):
    """Keeps a parameter where nobody finds it."""

    name = "hidden-parameter"

    def reset_parameters(self) -> None:
        self.holder = Holder(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.linear(x, quantised(self.holder.weight))


# ---------- optimizers


@told("global_norm")
class NormOfAPiece(SignMomentum, Optimizer):
    """Divides by the norm of a rank's own piece."""

    name = "norm-of-a-piece"

    def update(self, m: Tensor) -> Tensor:
        return m / (1e-8 + float(m.norm()))


@told("objective.backward")
class DifferentiatesItself(SignMomentum, Optimizer):
    """Takes the gradient for its curvature by torch.autograd.grad."""

    name = "differentiates-itself"
    hessian_update_interval = 1

    def update_curvature(self, objective: Any) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        losses = objective.shares(7) if hasattr(objective, "shares") else [objective.model.loss(7)]
        for loss in losses:
            found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            for p, gradient in zip(params, found, strict=True):
                self.state[p]["curvature"] = self.state[p].get("curvature", 0) + gradient.square()


@told('unit = "matrix"')
class NormalisesMatrices(BucketOptimizer, Optimizer):
    """Divides every matrix by its norm, of which it is given a piece."""

    name, citation = "normalises-matrices", CITATION

    def __init__(self, groups: Any, *, lr: float = 0.02, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def prepare(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        return {}

    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        for p, gradient in zip(params, gradients, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(gradient / (1e-8 + gradient.norm()), alpha=group["lr"])
