"""The update that both Sophias share: momentum divided by curvature, clipped element-wise (Liu et
al. 2023, arXiv 2305.14342).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lswt_core.interfaces import Objective
from lswt_core.plugin_api.optimizer import (
    BucketOptimizer,
    add_scaled_,
    cast_like,
    require_bounds,
    widen_moment,
)
from lswt_core.plugin_api.sharded_tensor import local_tensor, local_tensors, sum_over_pieces


class ClippedMomentum(BucketOptimizer):
    """``p -= lr * clip(m / damped(gamma * h), 1)`` after decoupled weight decay; momentum m and
    curvature h are not bias-corrected.

    Both are computed in float32 even for narrower parameters: curvatures lie around 1e-12 to 1e-8,
    which float16 rounds to 0. They are stored in float32 or, in half the memory, in bfloat16, which
    has the same range.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        gamma: float,
        weight_decay: float,
        eps: float,
        hessian_update_interval: int,
        fraction: float,
        moments: str,
    ) -> None:
        require_bounds(
            type(self), lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps
        )
        require_bounds(
            type(self),
            gamma=gamma,
            rho=gamma,
            hessian_update_interval=hessian_update_interval,
            fraction=fraction,
        )
        # In the groups, so that it is part of state_dict() and is never read back from a device.
        super().__init__(
            groups, {"lr": lr, "weight_decay": weight_decay, "since_hessian_update": 0}
        )
        self.beta1, self.beta2, self.gamma, self.eps = beta1, beta2, gamma, eps
        self.hessian_update_interval, self.fraction = hessian_update_interval, fraction
        self.moments = {"float32": torch.float32, "bfloat16": torch.bfloat16}[moments]

    @abstractmethod
    def damp_(self, bounds: tuple[Tensor, ...]) -> None:
        """Keep ``gamma * h``, which the momentum is divided by, away from zero, in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. Raises RuntimeError if the curvature is older
        than ``hessian_update_interval`` steps.
        """
        self._require_recent_curvature()
        loss = super().step(closure)
        for group in self.param_groups:
            group["since_hessian_update"] += 1
        return loss

    def statistics(self) -> dict[str, Tensor]:
        """The share of coordinates that were not clipped at the last curvature update, ``|m| <
        gamma * h`` (the official code's win rate; 0 = sign momentum).
        """
        if not self.state:
            return {}
        unclipped = torch.stack([state["unclipped"] for state in self.state.values()]).sum()
        return {"unclipped_share": unclipped / sum(p.numel() for p in self.state)}

    def begin_curvature_update(self, objective: Objective) -> Objective:
        """The objective to estimate from: all rows of the step, or ``fraction`` of them. If the
        estimate is not finite, the old curvature serves one more step, and the update is retried
        then.
        """
        for group in self.param_groups:
            group["since_hessian_update"] = min(
                group["since_hessian_update"], self.hessian_update_interval - 1
            )
        return objective if self.fraction == 1 else objective.subset(self.fraction)

    def average_curvature(
        self,
        params: Sequence[Tensor],
        left: Sequence[Tensor],
        right: Sequence[Tensor],
        weight: float = 1.0,
    ) -> None:
        """Take the estimate ``weight * left * right`` into the moving average of the curvature, at
        the end of a curvature update.
        """
        for p, a, b in zip(params, local_tensors(left), local_tensors(right), strict=True):
            state = self.prepare({}, p)
            curvature, momentum = local_tensor(state["curvature"]), local_tensor(state["momentum"])
            wide = widen_moment(curvature).mul_(self.beta2)
            wide.addcmul_(*cast_like((a, b), (wide, wide)), value=(1 - self.beta2) * weight)
            curvature.copy_(wide)
            # Without damping, which would count coordinates without momentum and curvature.
            unclipped = momentum.abs() < self.gamma * curvature
            state["unclipped"] = unclipped.sum().float()
        counts = torch.stack([self.state[p]["unclipped"] for p in params])
        for p, count in zip(params, sum_over_pieces(counts, params[0]).unbind(), strict=True):
            self.state[p]["unclipped"] = count.clone()
        for group in self.param_groups:
            group["since_hessian_update"] = 0

    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        """One clipped update."""
        moments = [state["momentum"] for state in states]
        torch._foreach_mul_(moments, self.beta1)
        torch._foreach_add_(moments, gradients, alpha=1 - self.beta1)
        bounds = torch._foreach_mul([state["curvature"] for state in states], self.gamma)
        self.damp_(bounds)
        updates = torch._foreach_div(moments, bounds)
        torch._foreach_clamp_max_(updates, 1.0)
        torch._foreach_clamp_min_(updates, -1.0)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        add_scaled_(params, updates, -group["lr"])

    def compile_kernels(self) -> None:
        """Compile the update."""
        self.compile_update()

    def prepare(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """The state: momentum, curvature, and how many coordinates were not clipped."""
        state = self.state[p]
        if not state:
            state["momentum"], state["curvature"] = self.zeros(p), self.zeros(p)
            state["unclipped"] = torch.zeros((), dtype=torch.float32, device=p.device)
        return state

    def _require_recent_curvature(self) -> None:
        age = max(group["since_hessian_update"] for group in self.param_groups)
        if age >= self.hessian_update_interval:
            raise RuntimeError(
                f"optimizer {self.name!r} has taken {age} steps without a new curvature estimate,"
                f" and hessian_update_interval is {self.hessian_update_interval}: another step"
                " would be sign momentum, not Sophia. Call update_curvature(objective) before this"
                " step (and then every hessian_update_interval steps), or raise"
                " hessian_update_interval."
            )
