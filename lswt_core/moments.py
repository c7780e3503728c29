"""What optimizers share: a state of full precision that survives a save, and parameters taken a bucket at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lswt_core.interfaces import Optimizer

BUCKET = 1 << 24  # elements, 64 MB in float32: enough to fill any device


class BucketOptimizer(Optimizer, ABC):
    """An optimizer that says how one bucket of parameters is updated, and keeps moments made by ``zeros``."""

    @abstractmethod
    def update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Update parameters of a group, all of which have a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for params in buckets([p for p in group["params"] if p.grad is not None]):
                self.update(group, params)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state in its own precision; torch alone would round it to that of the parameters."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    self.state[p][key] = value.to(p.device) if isinstance(value, Tensor) else value


def zeros(p: Tensor) -> Tensor:
    """Where a moment of a parameter starts: zeros of its shape, in float32 even for narrower parameters."""
    return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


def gradients(params: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of parameters that have one, in the precision of their moments."""
    return like([p.grad for p in params if p.grad is not None], moments)


def like(values: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Values in the precision of their targets."""
    return [value.to(target.dtype) for value, target in zip(values, targets, strict=True)]


def buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in runs of about ``BUCKET`` elements, so that a step's temporaries stay small beside the model."""
    bucket: list[Tensor] = []
    for p in params:
        bucket.append(p)
        if sum(member.numel() for member in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
