"""The step both Sophias share: momentum divided by curvature, clipped coordinate by coordinate (Liu et al. 2023, arXiv 2305.14342)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lswt_core.interfaces import Optimizer

BUCKET = 1 << 24  # 64 MB in float32: enough to fill any device


class ClippedMomentum(Optimizer, ABC):
    """``p -= lr * clip(m / damped(gamma * h), 1)`` after decoupled weight decay; momentum m and curvature h are not bias-corrected.

    Both are kept in float32 even for narrower parameters: curvatures lie around 1e-12 to 1e-8, which half precision rounds to 0.
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
        refresh_every: int,
    ) -> None:
        # The count lives in the groups so that it travels with state_dict() and never has to be read back from a device.
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "since_refresh": 0})
        self.beta1, self.beta2, self.gamma, self.eps = beta1, beta2, gamma, eps
        self.refresh_every = refresh_every

    @abstractmethod
    def damp_(self, bounds: tuple[Tensor, ...]) -> None:
        """Keep ``gamma * h`` away from zero, in place: momentum is divided by what this leaves."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; refuses to go on once the curvature is older than ``refresh_every`` steps."""
        self._require_curvature()
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for params in buckets([p for p in group["params"] if p.grad is not None]):
                self._update(group, params)
            group["since_refresh"] += 1
        return loss

    def statistics(self) -> dict[str, Tensor]:
        """The share of coordinates that were not clipped in the last step that followed a refresh (0 = sign momentum)."""
        if not self.state:
            return {}
        unclipped = torch.stack([state["unclipped"] for state in self.state.values()]).sum()
        return {"unclipped_share": unclipped / sum(p.numel() for p in self.state)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state in its own precision; torch alone would round it to that of the parameters."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    self.state[p][key] = value.to(p.device)

    def blend(self, params: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor], weight: float = 1.0) -> None:
        """Take ``weight * left * right`` into the running curvature of some parameters: what a refresh ends with."""
        curvatures = [self._state_of(p)["curvature"] for p in params]
        torch._foreach_mul_(curvatures, self.beta2)
        torch._foreach_addcmul_(curvatures, _like(left, curvatures), _like(right, curvatures), value=(1 - self.beta2) * weight)
        for group in self.param_groups:
            group["since_refresh"] = 0

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self._state_of(p) for p in params]
        moments = [state["momentum"] for state in states]
        torch._foreach_mul_(moments, self.beta1)
        torch._foreach_add_(moments, _like([p.grad for p in params if p.grad is not None], moments), alpha=1 - self.beta1)
        bounds = torch._foreach_mul([state["curvature"] for state in states], self.gamma)
        if group["since_refresh"] == 0:
            for state, bound in zip(states, bounds, strict=True):
                # Measured before damping: a coordinate that has neither momentum nor curvature would count as un-clipped.
                state["unclipped"] = (state["momentum"].abs() < bound).sum().float()
        self.damp_(bounds)
        updates = torch._foreach_div(moments, bounds)
        torch._foreach_clamp_max_(updates, 1.0)
        torch._foreach_clamp_min_(updates, -1.0)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            precision = torch.promote_types(p.dtype, torch.float32)
            state["momentum"] = torch.zeros_like(p, dtype=precision)
            state["curvature"] = torch.zeros_like(p, dtype=precision)
            state["unclipped"] = torch.zeros((), dtype=torch.float32, device=p.device)
        return state

    def _require_curvature(self) -> None:
        taken = max(group["since_refresh"] for group in self.param_groups)
        if taken >= self.refresh_every:
            raise RuntimeError(
                f"optimizer {self.name!r} has taken {taken} steps without a new estimate of the curvature, and refresh_every is "
                f"{self.refresh_every}: going on would be sign momentum, not Sophia. Call refresh(objective) before this step "
                "(and then every refresh_every steps), or raise refresh_every."
            )


def buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in runs of about ``BUCKET`` elements, so that a step's temporaries stay small beside the model."""
    bucket: list[Tensor] = []
    for p in params:
        bucket.append(p)
        if sum(member.numel() for member in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _like(values: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    return [value.to(target.dtype) for value, target in zip(values, targets, strict=True)]
