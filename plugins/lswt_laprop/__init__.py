"""LaProp: gradients are normalised first and averaged second (Ziyin et al. 2020, arXiv 2002.04839)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lswt_core.foreach import buckets, gradients
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer


class LaProp(Optimizer):
    """``n = b2 n + (1 - b2) g^2``, ``m = b1 m + (1 - b1) lr g sqrt(1 - b2^t) / (sqrt(n) + eps)``, and after decoupled weight decay
    ``p -= lr m / r`` with ``r`` the average of the learning rates by the same weights (Algorithm 1).

    As in its authors' code every gradient enters the momentum with the learning rate it met, so a change of the rate acts with the
    momentum's delay; at a constant rate it cancels. Moments are kept in float32 even for narrower parameters. Not offered are that
    code's variants: "centered" with "amsgrad" leaves out root and eps for ten steps and diverges.
    """

    name = "laprop"
    citation = """@article{ziyin2020laprop,
  title = {LaProp: Separating Momentum and Adaptivity in Adam},
  author = {Ziyin, Liu and Wang, Zhikang T. and Ueda, Masahito},
  journal = {arXiv preprint arXiv:2002.04839},
  year = {2020}
}"""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: Annotated[float, Gt(0)] = 1e-3,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.95,
        eps: Annotated[float, Gt(0)] = 1e-8,
        weight_decay: Annotated[float, Ge(0)] = 0.1,
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for params in buckets(group["params"]):
                self._update(params, group["lr"], group["weight_decay"])
        return loss

    def _update(self, params: list[Tensor], lr: float, decay: float) -> None:
        states = [self._advanced(p, lr) for p in params]
        moments, squares = [s["momentum"] for s in states], [s["square"] for s in states]
        grads = gradients(params, moments)
        torch._foreach_mul_(squares, self.beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - self.beta2)
        bounds = torch._foreach_sqrt(squares)
        torch._foreach_add_(bounds, self.eps)
        updates = torch._foreach_div(grads, bounds)
        torch._foreach_mul_(updates, [math.sqrt(1 - self.beta2 ** s["step"]) for s in states])
        torch._foreach_mul_(moments, self.beta1)
        torch._foreach_add_(moments, updates, alpha=(1 - self.beta1) * lr)
        torch._foreach_mul_(params, 1 - lr * decay)
        scales = [-lr / s["rate"] if s["rate"] else 0.0 for s in states]
        torch._foreach_add_(params, torch._foreach_mul(moments, scales))

    def _advanced(self, p: Tensor, lr: float) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            precision = torch.promote_types(p.dtype, torch.float32)
            state["momentum"] = torch.zeros_like(p, dtype=precision)
            state["square"] = torch.zeros_like(p, dtype=precision)
            # Numbers, not tensors: they are never read back from a device, and JSON keeps all their bits.
            state["step"], state["rate"] = 0, 0.0
        state["step"] += 1
        state["rate"] = self.beta1 * state["rate"] + (1 - self.beta1) * lr
        return state


@hookimpl
def lswt_components() -> list[type]:
    """Offer LaProp."""
    return [LaProp]
