"""Padded and packed batches: every row's own tokens against the end of the segment, the padding
before them a document of its own, and texts that share a row documents that do not see each other.

So a text computes what it would alone, wherever padding stands and whatever it is packed with: what
it sees begins at its first token, and positions count from there or from the segment's end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """How the tokens of a segment are put together, and what each of them sees."""

    # [B, T] where each packed place takes its token from; None: its own
    order: Tensor | None = None
    # [B, T] coordinate where what each packed token sees begins; None: all
    first_visible: Tensor | None = None
    # [B] tokens so far of the text that each row ends with; None: all of them
    own: Tensor | None = None

    @classmethod
    def of(cls, valid: Tensor) -> Packing:
        """For valid [B, T], False at padding."""
        # padding first, tokens in their order
        order = valid.to(torch.int8).argsort(dim=1, stable=True)
        first = (~valid).sum(1, keepdim=True)  # [B, 1]
        place = torch.arange(valid.shape[1], device=valid.device)
        return cls(order, first.where(place >= first, 0), valid.sum(1))

    def parted(self, begins: Tensor, before: Tensor) -> Packing:
        """The same where texts begin at some packed places, bool [B, T]; of each row's first one,
        ``before`` [B] tokens were read.
        """
        length = begins.shape[1]
        first = -before[:, None] if self.first_visible is None else self.first_visible
        place = torch.arange(length, device=begins.device)
        first_visible = place.where(begins, first).cummax(1).values
        own = length - first_visible[:, -1]
        return Packing(
            self.order, first_visible, own if self.own is None else own.minimum(self.own)
        )

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] in packed order."""
        return x if self.order is None else x.gather(1, along(self.order, x))

    def unpack(self, x: Tensor) -> Tensor:
        """Packed [B, T, ...] back in the batch's own order."""
        return x if self.order is None else x.gather(1, along(self.order.argsort(dim=1), x))


def along(order: Tensor, x: Tensor) -> Tensor:
    """An order [B, T] as an index into x [B, T, ...]."""
    return order.view(*order.shape, *(1,) * (x.ndim - 2)).expand(x.shape)


def text_begins(positions: Tensor, real: Tensor, first: tuple[Tensor, ...]) -> Tensor | None:
    """Where a text begins within a row, bool [B, T], by packed positions [B, T]: at every 0 but the
    row's first token's, which is at one of the positions ``first``, each [B]. None: nowhere. What
    is not ``real`` [B, T] is padding.

    Raises ValueError where positions do anything but count on or begin again: this model has none
    to give tokens freely.
    """
    previous = positions.roll(1, 1)
    # [B, T] each row's first token
    head = real & ~torch.cat((torch.zeros_like(real[:, :1]), real[:, :-1]), 1)
    expected = torch.stack([positions == one[:, None] for one in first]).any(0)
    begins = real & ~head & (positions == 0)
    wrong = real & ~torch.where(head, expected, begins | (positions == previous + 1))
    refused, parted = torch.stack((wrong.any(), begins.any())).tolist()
    if refused:
        row, place = (int(i) for i in wrong.nonzero()[0])
        if head[row, place]:
            wanted = " or ".join(str(n) for n in sorted({int(one[row]) for one in first}))
            raise ValueError(
                f"position_ids of row {row} begin at {int(positions[row, place])}, not {wanted}:"
                " positions are relative here and count the tokens that were read; leave"
                " position_ids out"
            )
        raise ValueError(
            f"position_ids of row {row} go from {int(previous[row, place])} to"
            f" {int(positions[row, place])}: they count on, or begin again at 0 where another text"
            " begins; no other positions can be given"
        )
    return begins if parted else None
