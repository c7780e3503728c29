"""Finiteness checks: of gradients, of weights after an update, and of a checkpoint's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lswt_core.distributed.world import World
from lswt_core.plugin_api.sharded_tensor import local_tensor, local_tensors


class NotFinite(Exception):
    """A loss, gradient or Hessian estimate is infinite or NaN; nothing of it may be used."""

    def __init__(self, loss: float | None = None) -> None:
        """``loss`` is the cross-entropy of the batch, where it was measured."""
        super().__init__()
        self.loss = loss


def require_finite(world: World, tensors: Sequence[Tensor]) -> None:
    """Raise NotFinite, on every rank, if the norm of a rank's tensor is infinite or NaN.
    Synchronises with the device.
    """
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    if world.any(not norms.isfinite().all()):
        raise NotFinite


@torch.no_grad()
def weights_overflow(weights: Sequence[Tensor]) -> Tensor:
    """1 if the norm of any weight is not finite, else 0: a float64 scalar on the weights' device,
    computed without a synchronisation.

    Weights whose norm alone overflows float32 count too. The largest magnitude would be exact, but
    is slow on a CPU; the norms cost one more read of the weights, a seventh of AdamW's traffic.
    """
    norms = torch.stack(torch._foreach_norm(local_tensors(weights)))
    return norms.isfinite().all().logical_not().double()


def find_nonfinite(groups: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """The names, as "group/tensor", of all tensors with an infinite or NaN element on this rank."""
    floating = {
        f"{group}/{name}": local_tensor(tensor)
        for group, members in groups.items()
        for name, tensor in members.items()
        # float8 has no norm; where a number was not finite, neither is its scale
        if tensor.is_floating_point() and tensor.element_size() > 1 and local_tensor(tensor).numel()
    }
    norms = torch._foreach_norm(list(floating.values())) if floating else ()
    suspects = [name for name, norm in zip(floating, norms, strict=True) if not math.isfinite(norm)]
    # the norm of finite numbers may overflow, so suspects are read element by element
    return [name for name in suspects if not floating[name].isfinite().all()]
