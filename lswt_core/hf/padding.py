"""Padded batches: every row's own tokens against the end of the segment, the padding before them a document of its own.

So a row of a padded batch computes what it would alone, wherever its padding stands: what it sees begins at its first token, and
positions count from there or from the segment's end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """How the tokens of a segment are put together."""

    order: Tensor  # [B, T] where each packed place takes its token from
    starts: Tensor  # [B, T] coordinate at which what each packed token sees begins

    @classmethod
    def of(cls, valid: Tensor) -> Packing:
        """For valid [B, T], False at padding."""
        order = valid.to(torch.int8).argsort(dim=1, stable=True)  # padding first, tokens in their order
        first = (~valid).sum(1, keepdim=True)  # [B, 1]
        place = torch.arange(valid.shape[1], device=valid.device)
        return cls(order, first.where(place >= first, 0))

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] in packed order."""
        return x.gather(1, along(self.order, x))

    def unpack(self, x: Tensor) -> Tensor:
        """Packed [B, T, ...] back in the batch's own order."""
        return x.gather(1, along(self.order.argsort(dim=1), x))


def along(order: Tensor, x: Tensor) -> Tensor:
    """An order [B, T] as an index into x [B, T, ...]."""
    return order.view(*order.shape, *(1,) * (x.ndim - 2)).expand(x.shape)
