"""Optimizers and schedules, each wrong in one way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lswt_core.interfaces import Horizon, Optimizer, Schedule
from mutants.meant import CITED, meant


class Plain(Optimizer):
    """A right optimizer for mutants to spoil: momentum, decoupled decay."""

    citation = CITED

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float = 0.02, weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state["momentum"] = state.get("momentum", torch.zeros_like(p)).lerp(p.grad, 0.3)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(self.update(m), alpha=group["lr"])

    def update(self, m: Tensor) -> Tensor:
        return m.sign()


@meant("replay")
class Gambling(Plain, Optimizer):
    """Draws from the global generator."""

    name = "gambling"

    def update(self, m: Tensor) -> Tensor:
        return m.sign() * torch.rand(()) * 2


@meant("resume")
class Amnesic(Plain, Optimizer):
    """Counts its steps where no checkpoint looks."""

    name = "amnesic"
    calls = 0

    def update(self, m: Tensor) -> Tensor:
        self.calls += 1
        return m.sign() / (1 + 0.01 * self.calls)


@meant("learning rate")
class Headstrong(Plain, Optimizer):
    """Has a rate of its own."""

    name = "headstrong"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.02)


@meant("decay")
class Levelling(Plain, Optimizer):
    """Decays all groups alike."""

    name = "levelling"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.01 * group["lr"])


@meant("descent")
class Climbing(Plain, Optimizer):
    """Goes uphill."""

    name = "climbing"

    def update(self, m: Tensor) -> Tensor:
        return -m.sign()


@meant("refresh")
class Restless(Plain, Optimizer):
    """Moves parameters while it looks at the curvature."""

    name = "restless"
    hessian_update_interval = 5

    @torch.no_grad()
    def update_curvature(self, objective: Any) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.999)
                self.state[p]["seen"] = torch.ones_like(p)


@meant("range")
class Vanishing(Schedule):
    """Divides by zero at the end."""

    name = "vanishing"

    def factor(self, step: int) -> float:
        return float("nan") if step == self.horizon.steps else 1.0


@meant("pure")
class Ageing(Schedule):
    """Falls with every question."""

    name = "ageing"

    def __init__(self, horizon: Horizon) -> None:
        super().__init__(horizon)
        self.asked = 0

    def factor(self, step: int) -> float:
        self.asked += 1
        return 1 / self.asked
