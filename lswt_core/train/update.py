"""One optimizer update, in the order that trainer, benchmark and conformance checks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lswt_core.interfaces import Objective, Optimizer
from lswt_core.plugin_api.sharded_tensor import global_norm, local_tensors
from lswt_core.train.finite import NotFinite

# From the global gradient norm, [], to numbers of the step: "grad_norm", and "loss" if it is known.
Measure = Callable[[Tensor], Mapping[str, float]]


class UpdateObjective(Objective, Protocol):
    """An objective whose backward pass may take sampled gradients from the same forward pass."""

    @property
    def sampled(self) -> Objective | None:
        """The objective with the sampled gradients of ``backward("data")``; None if none were
        taken.
        """


class Update(NamedTuple):
    """The outcome of one update."""

    values: Mapping[str, float]  # as measured
    curvature_is_finite: bool  # False: a Hessian estimate was due and discarded


def measure_norm(norm: Tensor) -> dict[str, float]:
    """The gradient norm alone."""
    return {"grad_norm": float(norm)}


def apply_update(
    optimizer: Optimizer,
    objective: UpdateObjective,
    params: Sequence[Tensor],
    *,
    update_hessian: bool,
    grad_clip: float = 0.0,
    measure: Measure = measure_norm,
) -> Update:
    """Make one update: backward pass, gradient norm, finiteness check, clipping, Hessian estimate
    if it shares the forward pass, optimizer step, zero_grad, else Hessian estimate now.

    ``grad_clip`` bounds the gradient norm, 0: no bound. Raises NotFinite before anything has
    changed but ``p.grad`` if ``measure`` gives a loss or norm that is not finite.
    """
    objective.backward("data")
    norm = gradient_norm(params)
    values = measure(norm)
    if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm") if name in values):
        raise NotFinite(values.get("loss"))
    clip_gradients(params, norm, values["grad_norm"], grad_clip)
    shares_forward = optimizer.shares_forward
    finite = True
    if update_hessian and shares_forward:
        assert objective.sampled is not None, "no sampled gradients were taken"
        finite = update_curvature(optimizer, objective.sampled, params)
    optimizer.step()
    optimizer.zero_grad()
    if update_hessian and not shares_forward:
        finite = update_curvature(optimizer, objective, params)
    return Update(values, finite)


def hessian_update_is_due(optimizer: Optimizer, step: int) -> bool:
    """Whether update number ``step``, from 0, also updates the Hessian estimate."""
    interval = optimizer.hessian_update_interval
    return interval > 0 and step % interval == 0


def gradient_norm(params: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, []."""
    return global_norm([p.grad for p in params if p.grad is not None])


def clip_gradients(
    params: Sequence[Tensor], norm: Tensor, norm_value: float, grad_clip: float
) -> None:
    """Gradient clipping: scale gradients down to norm ``grad_clip`` (0: no bound).
    ``norm_value`` is ``norm`` on the host: gradients below the bound, which is the common case, are
    not touched.
    """
    if grad_clip and norm_value > grad_clip * (1 - 1e-4):  # close to the bound the device decides
        factor = (grad_clip / (norm + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_
        gradients = local_tensors([p.grad for p in params if p.grad is not None])
        torch._foreach_mul_(gradients, factor)


def update_curvature(optimizer: Optimizer, objective: Objective, params: Sequence[Tensor]) -> bool:
    """Update an optimizer's Hessian estimate; the current gradients are put aside and restored.
    Returns False if the estimate is not finite and was discarded.
    """
    gradients = [p.grad for p in params]
    optimizer.zero_grad()
    try:
        optimizer.update_curvature(objective)
    except NotFinite:
        return False
    finally:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
    return True
