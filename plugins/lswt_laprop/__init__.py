"""LaProp: momentum of normalised gradients (Ziyin et al. 2020, arXiv 2002.04839)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.optimizer import BucketOptimizer, require_bounds


class LaProp(BucketOptimizer, Optimizer):
    """``n = b2 n + (1-b2) g^2; m = b1 m + (1-b1) lr g sqrt(1-b2^t) / (sqrt(n) + eps); p -= m lr /
    rate`` after decoupled decay.

    The learning rate is averaged like the gradients, ``rate = b1 rate + (1-b1) lr``: this corrects
    the momentum's bias, and delays a change of the learning rate as momentum does. The original's
    amsgrad and centered variants are not offered: together they skip root and eps in the first ten
    steps.
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
        eps: Annotated[float, Ge(1e-30)] = 1e-8,
        weight_decay: Annotated[float, Ge(0)] = 0.1,
    ) -> None:
        require_bounds(
            type(self), lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay
        )
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        """One update: normalise the new gradient, then average."""
        lr = group["lr"]
        moments = [state["momentum"] for state in states]
        squares = [state["square"] for state in states]
        torch._foreach_mul_(squares, self.beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - self.beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_add_(scales, self.eps)
        normalised = torch._foreach_div(gradients, scales)
        bias_corrections = [math.sqrt(1 - self.beta2 ** state["step"]) for state in states]
        torch._foreach_mul_(normalised, bias_corrections)
        torch._foreach_mul_(moments, self.beta1)
        torch._foreach_add_(moments, normalised, alpha=(1 - self.beta1) * lr)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        # The averaged rate is 0 while every learning rate was 0; the momentum is 0 then, too.
        factors = [lr / state["rate"] if state["rate"] else 0.0 for state in states]
        torch._foreach_sub_(params, torch._foreach_mul(moments, factors))

    def prepare(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """The state: moments, and step and averaged rate of this step, which are Python numbers: no
        device synchronisation.
        """
        state = self.state[p]
        if not state:
            state |= {"momentum": self.zeros(p), "square": self.zeros(p), "step": 0, "rate": 0.0}
        state["step"] += 1
        state["rate"] = self.beta1 * state["rate"] + (1 - self.beta1) * group["lr"]
        return state


@hookimpl
def lswt_components() -> list[type]:
    """Offer LaProp."""
    return [LaProp]
