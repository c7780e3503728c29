"""What optimizers that update many tensors at once have in common. Open to plugins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

BUCKET = 1 << 24  # elements, 64 MB in float32: enough to fill any device


def buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Those parameters that have a gradient, in runs of about ``BUCKET`` elements: a step's temporaries stay small beside the model."""
    bucket: list[Tensor] = []
    for p in params:
        if p.grad is None:
            continue
        bucket.append(p)
        if sum(member.numel() for member in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def gradients(params: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of some parameters, in the precision of ``targets``."""
    return like([p.grad for p in params if p.grad is not None], targets)


def like(values: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the precision of others."""
    return [value.to(target.dtype) for value, target in zip(values, targets, strict=True)]
