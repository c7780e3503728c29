"""Sophia: momentum divided by an estimate of the Hessian's diagonal, and clipped (Liu et al. 2023,
arXiv 2305.14342).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Objective, Optimizer
from lswt_core.plugin_api.optimizer import require_bounds

from .clipped import ClippedMomentum

CITATION = """@inproceedings{liu2024sophia,
  title = {Sophia: A Scalable Stochastic Second-order Optimizer for Language Model Pre-training},
  author = {Liu, Hong and Li, Zhiyuan and Hall, David and Liang, Percy and Ma, Tengyu},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  note = {arXiv 2305.14342}
}"""


class SophiaG(ClippedMomentum, Optimizer):
    """Sophia with the Gauss-Newton-Bartlett estimator (Algorithm 2), with the defaults of the
    authors' code for 125M parameters. It is a Gauss-Newton matrix of cross-entropy alone, for which
    the paper derives it (section 2.3), without auxiliary losses and loss terms of layers.

    ``rho`` is the paper's gamma: coordinates whose momentum is below ``rho`` times their curvature
    are not clipped. ``fraction`` is the share of a step's rows used for the estimate.
    ``clip_estimate`` clips the norm of the sampled gradient before it is squared, 0 for none: the
    authors' code clips to 1, which shrinks the curvature; the paper does not. ``moments``
    "bfloat16" halves the memory of momentum and curvature. ``shared_forward`` estimates before the
    update instead of after it, as the authors do, reusing the forward pass of the training
    gradient: a curvature update costs one backward pass instead of a forward and a backward pass,
    and memory for a second gradient meanwhile.
    """

    name = "sophia-g"
    citation = CITATION

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: Annotated[float, Gt(0)] = 6e-4,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.965,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.99,
        rho: Annotated[float, Gt(0)] = 0.05,
        weight_decay: Annotated[float, Ge(0)] = 0.2,
        eps: Annotated[float, Ge(1e-30)] = 1e-15,
        hessian_update_interval: Annotated[int, Ge(1)] = 10,
        fraction: Annotated[float, Gt(0), Le(1)] = 1.0,
        moments: Literal["float32", "bfloat16"] = "float32",
        clip_estimate: Annotated[float, Ge(0)] = 0.0,
        shared_forward: bool = False,
    ) -> None:
        require_bounds(type(self), clip_estimate=clip_estimate)
        super().__init__(
            groups,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            gamma=rho,
            weight_decay=weight_decay,
            eps=eps,
            hessian_update_interval=hessian_update_interval,
            fraction=fraction,
            moments=moments,
        )
        self.clip_estimate, self.shares_forward = clip_estimate, shared_forward

    def damp_(self, bounds: tuple[Tensor, ...]) -> None:
        """Add eps, as the authors' code does."""
        torch._foreach_add_(bounds, self.eps)

    @torch.no_grad()
    def update_curvature(self, objective: Objective) -> None:
        """Estimate the diagonal of the Gauss-Newton matrix from labels sampled from the model:
        tokens times the square of the mean gradient.

        The gradient is accumulated over all micro-batches before it is squared; squaring that of
        every micro-batch would be too large by their number.
        """
        objective = self.begin_curvature_update(objective)
        with torch.enable_grad():
            objective.backward("sampled")
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.clip_estimate:
            torch.nn.utils.clip_grad_norm_(params, self.clip_estimate)
        gradients = [p.grad for p in params if p.grad is not None]
        self.average_curvature(params, gradients, gradients, weight=objective.tokens)
        self.zero_grad()


class SophiaH(ClippedMomentum, Optimizer):
    """Sophia with Hutchinson's estimator (Algorithm 1): ``u * (Hessian u)`` for a random probe u.
    The Hessian is that of the loss that is trained on, as in the paper (section 2.3): auxiliary
    losses and loss terms of layers included.

    Estimates may be negative. Where the running curvature is not positive, the step is lr times the
    sign of the momentum. Rademacher probes (+1 or -1) have less than half the variance of the
    paper's Gaussian ones. ``fraction`` is the share of a step's rows used for the estimate.
    """

    name = "sophia-h"
    needs_hessian_vector_products = True
    citation = CITATION

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: Annotated[float, Gt(0)] = 6e-4,
        beta1: Annotated[float, Ge(0), Lt(1)] = 0.965,
        beta2: Annotated[float, Ge(0), Lt(1)] = 0.99,
        gamma: Annotated[float, Gt(0)] = 0.01,
        weight_decay: Annotated[float, Ge(0)] = 0.2,
        eps: Annotated[float, Ge(1e-30)] = 1e-12,
        hessian_update_interval: Annotated[int, Ge(1)] = 10,
        fraction: Annotated[float, Gt(0), Le(1)] = 1.0,
        moments: Literal["float32", "bfloat16"] = "float32",
        probe: Literal["gaussian", "rademacher"] = "gaussian",
    ) -> None:
        super().__init__(
            groups,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            gamma=gamma,
            weight_decay=weight_decay,
            eps=eps,
            hessian_update_interval=hessian_update_interval,
            fraction=fraction,
            moments=moments,
        )
        self.probe = probe

    def damp_(self, bounds: tuple[Tensor, ...]) -> None:
        """Clamp to at least eps, negative curvature included."""
        torch._foreach_clamp_min_(bounds, self.eps)

    @torch.no_grad()
    def update_curvature(self, objective: Objective) -> None:
        """Estimate the Hessian's diagonal by one Hessian-vector product; the probe is drawn on the
        CPU, so that it is the same on every device.
        """
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        generator = objective.generator("hutchinson")
        probes = [self._draw_probe(p, generator) for p in params]
        objective = self.begin_curvature_update(objective)
        with torch.enable_grad():
            products = objective.hessian_vector_product(params, probes)
        self.average_curvature(params, probes, products)
        self.zero_grad()

    def _draw_probe(self, p: Tensor, generator: torch.Generator) -> Tensor:
        if self.probe == "gaussian":
            u = torch.randn(p.shape, generator=generator)
        else:
            u = torch.empty(p.shape).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        return u.to(p)


@hookimpl
def lswt_components() -> list[type]:
    """Offer Sophia with both estimators."""
    return [SophiaG, SophiaH]
