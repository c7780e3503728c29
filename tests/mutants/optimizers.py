"""Optimizers and schedules with one mistake each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lswt_core.interfaces import Horizon, Optimizer, Schedule
from mutants.expected import CITATION, caught_by


class SignMomentum(Optimizer):
    """A correct optimizer, the base of mutants: sign momentum, decoupled weight decay."""

    citation = CITATION

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float = 0.02, weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.get("momentum", torch.zeros_like(p)).lerp(p.grad, 0.3)
                state["momentum"] = m
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(self.update(m), alpha=group["lr"])

    def update(self, m: Tensor) -> Tensor:
        return m.sign()


@caught_by("determinism")
class GlobalRandomness(SignMomentum, Optimizer):
    """Draws from the global generator."""

    name = "global-randomness"

    def update(self, m: Tensor) -> Tensor:
        return m.sign() * torch.rand(()) * 2


@caught_by("resume")
class UnsavedCounter(SignMomentum, Optimizer):
    """Keeps its step count in an attribute, which checkpoints do not save."""

    name = "unsaved-counter"
    calls = 0

    def update(self, m: Tensor) -> Tensor:
        self.calls += 1
        return m.sign() / (1 + 0.01 * self.calls)


@caught_by("resume")
class ListOnSelf(SignMomentum, Optimizer):
    """Keeps a list of earlier updates in an attribute."""

    name = "list-on-self"

    def update(self, m: Tensor) -> Tensor:
        self.earlier = [*getattr(self, "earlier", [])[-3:], float(m.norm())]
        return m.sign() / (1 + sum(self.earlier))


@caught_by("all parameters")
class SkipsScalars(SignMomentum, Optimizer):
    """Leaves out parameters without dimensions."""

    name = "skips-scalars"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not p.dim():
                    p.grad.zero_()
        super().step()


@caught_by("learning rate")
class IgnoresLearningRate(SignMomentum, Optimizer):
    """Takes an update with a learning rate of its own."""

    name = "ignores-learning-rate"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.02)


@caught_by("weight decay")
class DecaysEverything(SignMomentum, Optimizer):
    """Applies weight decay to every parameter group."""

    name = "decays-everything"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.01 * group["lr"])


@caught_by("descent")
class Ascending(SignMomentum, Optimizer):
    """Steps up the gradient."""

    name = "ascending"

    def update(self, m: Tensor) -> Tensor:
        return -m.sign()


@caught_by("curvature update")
class MovesParameters(SignMomentum, Optimizer):
    """Changes parameters in its curvature update."""

    name = "moves-parameters"
    hessian_update_interval = 5

    @torch.no_grad()
    def update_curvature(self, objective: Any) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.999)
                self.state[p]["seen"] = torch.ones_like(p)


@caught_by("range")
class NanAtTheEnd(Schedule):
    """Its last factor is NaN."""

    name = "nan-at-the-end"

    def factor(self, step: int) -> float:
        return float("nan") if step == self.horizon.steps else 1.0


@caught_by("stateless")
class CountsCalls(Schedule):
    """Its factor depends on the number of calls."""

    name = "counts-calls"

    def __init__(self, horizon: Horizon) -> None:
        super().__init__(horizon)
        self.calls = 0

    def factor(self, step: int) -> float:
        self.calls += 1
        return 1 / self.calls


@caught_by("peak")
class NeverPeaks(Schedule):
    """Its largest factor is 0.9."""

    name = "never-peaks"

    def factor(self, step: int) -> float:
        return 0.9 * min(1.0, step / 100)


@caught_by("floor")
class EndsHalfWay(Schedule):
    """Decays over twice the horizon."""

    name = "ends-half-way"

    def __init__(self, horizon: Horizon, *, floor: float = 0.1) -> None:
        super().__init__(horizon)
        self.floor = floor

    def factor(self, step: int) -> float:
        return 1 - (1 - self.floor) * (step - 1) / (2 * self.horizon.steps)
