"""Lion: the sign of an interpolation of momentum and gradient (Chen et al. 2023, arXiv
2302.06675).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.optimizer import BucketOptimizer, add_scaled_, require_bounds


class Lion(BucketOptimizer, Optimizer):
    """``p -= lr sign(b1 m + (1-b1) g)`` after decoupled weight decay, then ``m = b2 m + (1-b2) g``
    (Algorithm 2).

    The paper advises a learning rate 3 to 10 times smaller than AdamW's and a weight decay as many
    times larger, so that ``lr * weight_decay`` stays the same.
    """

    name = "lion"
    citation = """@inproceedings{chen2023symbolic,
  title = {Symbolic Discovery of Optimization Algorithms},
  author = {Chen, Xiangning and Liang, Chen and Huang, Da and Real, Esteban and others},
  booktitle = {Advances in Neural Information Processing Systems},
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
        weight_decay: Annotated[float, Ge(0)] = 0.3,
    ) -> None:
        require_bounds(type(self), lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.beta1, self.beta2 = beta1, beta2

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
        """One update of the same size in every coordinate."""
        moments = [state["momentum"] for state in states]
        interpolated = torch._foreach_mul(moments, self.beta1)
        torch._foreach_add_(interpolated, gradients, alpha=1 - self.beta1)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        add_scaled_(params, torch._foreach_sign(interpolated), -group["lr"])
        torch._foreach_mul_(moments, self.beta2)
        torch._foreach_add_(moments, gradients, alpha=1 - self.beta2)

    def compile_kernels(self) -> None:
        """Compile the update."""
        self.compile_update()


@hookimpl
def lswt_components() -> list[type]:
    """Offer Lion."""
    return [Lion]
