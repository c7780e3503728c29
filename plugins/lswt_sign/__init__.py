"""Optimizers whose every coordinate moves by the learning rate: sign momentum and Lion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lswt_core.foreach import buckets, gradients
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer


class SignStep(Optimizer, ABC):
    """``p -= lr * sign(direction)`` after decoupled weight decay; the momentum is kept in float32 even for narrower parameters."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @abstractmethod
    def signs(self, moments: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        """Where every coordinate moves: -1, 0 or 1 in new tensors. Advances ``moments`` in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for params in buckets(group["params"]):
                moments = [self._momentum_of(p) for p in params]
                signs = self.signs(moments, gradients(params, moments))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, signs, alpha=-group["lr"])
        return loss

    def _momentum_of(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return state["momentum"]


class SignMomentum(SignStep, Optimizer):
    """The sign of an average of gradients (Signum, Bernstein et al. 2018, arXiv 1802.04434), with decoupled weight decay.

    It is what Sophia degenerates to when no curvature ever arrives, and what the original code really trained with ("Minato").
    """

    name = "sign-momentum"
    citation = """@inproceedings{bernstein2018signsgd,
  title = {signSGD: Compressed Optimisation for Non-Convex Problems},
  author = {Bernstein, Jeremy and Wang, Yu-Xiang and Azizzadenesheli, Kamyar and Anandkumar, Animashree},
  booktitle = {International Conference on Machine Learning},
  year = {2018},
  note = {arXiv 1802.04434}
}"""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: Annotated[float, Gt(0)] = 1e-4,
        beta: Annotated[float, Ge(0), Lt(1)] = 0.9,
        weight_decay: Annotated[float, Ge(0)] = 0.2,
    ) -> None:
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        self.beta = beta

    def signs(self, moments: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        """Those of the new momentum."""
        average_(moments, grads, self.beta)
        return torch._foreach_sign(moments)


class Lion(SignStep, Optimizer):
    """The sign of momentum and gradient mixed by ``beta1``; the momentum itself forgets by ``beta2`` (Chen et al. 2023,
    arXiv 2302.06675). Its authors advise a rate 3 to 10 times lower than AdamW's and as much more weight decay.
    """

    name = "lion"
    citation = """@inproceedings{chen2023symbolic,
  title = {Symbolic Discovery of Optimization Algorithms},
  author = {Chen, Xiangning and others},
  booktitle = {NeurIPS},
  year = {2023},
  note = {arXiv 2302.06675}
}"""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: Annotated[float, Gt(0)] = 1e-4,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.99,
        weight_decay: Annotated[float, Ge(0)] = 1.0,
    ) -> None:
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        self.beta1, self.beta2 = beta1, beta2

    def signs(self, moments: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
        """Those of momentum and gradient mixed, before the momentum moves on."""
        mixed = torch._foreach_mul(moments, self.beta1)
        torch._foreach_add_(mixed, grads, alpha=1 - self.beta1)
        average_(moments, grads, self.beta2)
        torch._foreach_sign_(mixed)
        return mixed


def average_(moments: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """Let the gradients into their running averages."""
    torch._foreach_mul_(moments, beta)
    torch._foreach_add_(moments, grads, alpha=1 - beta)


@hookimpl
def lswt_components() -> list[type]:
    """Offer both."""
    return [SignMomentum, Lion]
