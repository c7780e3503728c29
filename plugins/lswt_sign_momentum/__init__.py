"""Sign momentum, which the LSWTransformer's authors call Minato (Signum of Bernstein et al. 2018,
arXiv 1802.04434).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.optimizer import BucketOptimizer, require_bounds


class SignMomentum(BucketOptimizer, Optimizer):
    """``m = b m + (1-b) g; p -= lr sign(m)`` after decoupled weight decay.

    It equals Sophia with every coordinate clipped: the baseline that shows what curvature adds.
    """

    name = "sign-momentum"
    citation = """@inproceedings{bernstein2018signsgd,
  title = {signSGD: Compressed Optimisation for Non-Convex Problems},
  author = {Bernstein, Jeremy and Wang, Yu-Xiang and Azizzadenesheli, Kamyar and
    Anandkumar, Animashree},
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
        require_bounds(type(self), lr=lr, beta=beta, weight_decay=weight_decay)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.beta = beta

    def prepare(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """The state: momentum."""
        if not self.state[p]:
            self.state[p]["momentum"] = self.zeros(p)
        return self.state[p]

    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        """One update of the same size in every coordinate whose momentum is not 0."""
        moments = [state["momentum"] for state in states]
        torch._foreach_mul_(moments, self.beta)
        torch._foreach_add_(moments, gradients, alpha=1 - self.beta)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, torch._foreach_sign(moments), alpha=-group["lr"])


@hookimpl
def lswt_components() -> list[type]:
    """Offer sign momentum."""
    return [SignMomentum]
