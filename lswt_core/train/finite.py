"""Whether numbers are finite: of weights without waiting for the device, and of everything that a
checkpoint is to hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def overflow(weights: Sequence[Tensor]) -> Tensor:
    """1 if the norm of any of the tensors is not finite, else 0: a float64 scalar on their device,
    for which nothing waits.

    Weights so large that their norm overflows float32 count. It reads the weights once more, a
    seventh of what AdamW moves; the largest magnitude would be exact, and is slow on a CPU.
    """
    norms = torch.stack(torch._foreach_norm(list(weights)))
    return norms.isfinite().all().logical_not().double()


def damaged(groups: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """The names, as "group/tensor", of all tensors that hold a number that is not finite."""
    named = {
        f"{group}/{name}": tensor
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    floating = {
        name: tensor
        for name, tensor in named.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    norms = torch._foreach_norm(list(floating.values())) if floating else ()
    suspects = [name for name, norm in zip(floating, norms, strict=True) if not math.isfinite(norm)]
    # a norm may overflow alone
    return [name for name in suspects if not floating[name].isfinite().all()]
