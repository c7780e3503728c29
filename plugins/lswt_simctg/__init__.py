"""SimCTG: a contrastive loss that keeps the states of different tokens apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AuxiliaryLoss, Batch, Dims, LossSum, Output

BLOCK = 256  # rows of a block of cosines
SMALLEST_NORM = 1e-6  # a zero state has no direction; without this its cosine would be NaN


class SimCtg(AuxiliaryLoss):
    """max(0, margin - s(i, i) + s(i, j)) over all pairs i != j of valid tokens of a row, s the
    cosine of their final states (Su et al. 2022, arXiv 2202.06417, eq. 2), averaged over pairs.

    Pads may stand anywhere: a pair counts iff both its tokens are valid. A batch without any pair
    contributes zero. Cosines are taken in float32 at least, on the states' own device, a block of
    rows at a time: no [T, T] is kept. Two options reproduce older code: ``pads`` "right" is the
    SimCTG authors', which compares with a row's first tokens, as many as are valid, whether they
    are the valid ones or not; ``empty`` "nan" is theirs and the LSWTransformer's, where a batch
    without any pair is not a number.
    """

    name = "simctg"
    citation = """@inproceedings{su2022contrastive,
  title={A Contrastive Framework for Neural Text Generation},
  author={Su, Yixuan and Lan, Tian and Wang, Yan and Yogatama, Dani and Kong, Lingpeng and Collier, Nigel},
  booktitle={NeurIPS}, year={2022}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        margin: Annotated[float, Ge(0)] = 0.5,
        pads: Literal["anywhere", "right"] = "anywhere",
        empty: Literal["zero", "nan"] = "zero",
    ) -> None:
        super().__init__(dims)
        self.margin, self.pads, self.empty = margin, pads, empty

    def forward(self, out: Output, batch: Batch) -> LossSum:
        """Hinge of every pair of valid tokens, and their number."""
        count = self.count(batch)
        states = out.states
        # s(i, j) can round above 1: without this, margin 0 would not be exactly no loss
        if self.margin == 0:
            total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
        elif self.pads == "right" or states.is_meta:
            total = dense(
                states,
                self.margin,
                batch.valid if self.pads == "anywhere" else None,
                self.pairs(batch),
            )
        else:
            total = Contrast.apply(states, self.margin, batch.valid)
        return LossSum(total.where(count > 0, torch.nan) if self.empty == "nan" else total, count)

    def count(self, batch: Batch) -> Tensor:
        """Ordered pairs of different valid tokens, over all rows."""
        valid = self.valid(batch).sum(-1)  # [B], the same whichever are taken
        return (valid * (valid - 1)).sum()

    def pairs(self, batch: Batch) -> Tensor:
        """Which pairs count: bool [B, T, T]."""
        valid = self.valid(batch)
        if self.pads == "anywhere":
            return valid_pairs(valid)
        taken = self.taken(batch)
        return (
            (taken & valid)[:, :, None]
            & taken[:, None, :]
            & different(taken.shape[1], taken.device)
        )

    def valid(self, batch: Batch) -> Tensor:
        """Which tokens are not padding: bool [B, T]."""
        return (
            torch.ones_like(batch.inputs, dtype=torch.bool) if batch.valid is None else batch.valid
        )

    def taken(self, batch: Batch) -> Tensor:
        """As many tokens from the beginning of a row as are valid in it: bool [B, T]."""
        valid = self.valid(batch)
        return torch.arange(valid.shape[1], device=valid.device) < valid.sum(-1, keepdim=True)


class Contrast(torch.autograd.Function):
    """The sum of all hinges, a block of rows at a time; the gradient is computed on the way, and no
    matrix of all pairs exists.

    With s(i, i) = 1 a hinge is max(0, s(i, j) - (1 - margin)): one threshold. Cosines are
    symmetric, so half of them are enough, and with a(i, j) = 1 where the hinge is open the gradient
    is 2 sum_j a(i, j) u_j at unit state u_i. It needs a matrix product only where some hinges of a
    block are open and others are not.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, margin: float, valid: Tensor | None) -> Tensor:
        """States [B, T, M], valid [B, T] or None -> []."""
        unit, norm = directions(states, valid)
        total, gradient = in_blocks(
            unit, margin, valid, products_in(states) if ctx.needs_input_grad[0] else None
        )
        if gradient is not None:  # through the norm, at which the smallest ones are held
            radial = (gradient * unit).sum(-1, keepdim=True) * (norm > SMALLEST_NORM)
            gradient = gradient.addcmul_(unit, radial, value=-1).div_(norm).to(states.dtype)
        ctx.save_for_backward(states, valid, gradient)
        ctx.margin = margin
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        """Scale what the forward pass has computed; for a second derivative, differentiate the
        formula itself.
        """
        states, valid, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            everyone = (
                torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
                if valid is None
                else valid
            )
            total = dense(states, ctx.margin, valid, valid_pairs(everyone))
            return torch.autograd.grad(total, states, grad, create_graph=True)[0], None, None
        return gradient * grad.to(gradient.dtype), None, None


def in_blocks(
    unit: Tensor, margin: float, valid: Tensor | None, products: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The sum of hinges of unit states [B, T, M], and its gradient there, from matrix products in a
    precision (None: no gradient).
    """
    total, size = unit.new_zeros(()), unit.shape[1]
    gradient = None if products is None else torch.zeros_like(unit)
    rounded = unit if products is None else unit.to(products)
    with uncast(unit.device):
        for start in range(0, size, BLOCK):
            rows, later = slice(start, min(start + BLOCK, size)), slice(start, None)
            # [B, t, T - start]
            hinge = torch.bmm(unit[:, rows], unit[:, later].mT).sub_(1 - margin).clamp_min_(0.0)
            own = hinge[..., : rows.stop - start]
            own.diagonal(dim1=1, dim2=2).zero_()
            if valid is not None:
                hinge *= valid[:, rows, None] & valid[:, None, later]
            # pairs within the block are there in both orders already
            total += 2 * hinge.sum() - own.sum()
            if gradient is None:
                continue
            open_ = hinge > 0
            for columns, all_open in stretches(open_):
                others = slice(start + columns.start, start + columns.stop)
                if all_open:
                    gradient[:, rows] += unit[:, others].sum(1, keepdim=True)
                    gradient[:, others] += unit[:, rows].sum(1, keepdim=True)
                    continue
                factors = open_[..., columns].to(rounded.dtype)
                gradient[:, rows] += torch.bmm(factors, rounded[:, others])
                # within the block both orders are there already
                beyond = max(rows.stop - others.start, 0)
                gradient[:, others][:, beyond:] += torch.bmm(
                    factors[..., beyond:].mT, rounded[:, rows]
                )
    return total, None if gradient is None else gradient.mul_(2)


def stretches(open_: Tensor) -> Iterator[tuple[slice, bool]]:
    """The columns of hinges [B, t, n] that are not all closed, and whether they are all open: then
    the gradient is a sum of states and takes no product. Another device than the CPU would have to
    be waited for; there, all columns are one stretch.
    """
    if open_.device.type != "cpu":
        yield slice(0, open_.shape[-1]), False
        return
    shares = [int(tile.count_nonzero()) / tile.numel() for tile in open_.split(BLOCK, -1)]
    for (some, all_), group in groupby(
        range(len(shares)), lambda tile: (shares[tile] > 0, shares[tile] == 1)
    ):
        tiles = list(group)
        if some:
            yield slice(tiles[0] * BLOCK, min((tiles[-1] + 1) * BLOCK, open_.shape[-1])), all_


def dense(states: Tensor, margin: float, valid: Tensor | None, pairs: Tensor) -> Tensor:
    """The same by the formula, over pairs [B, T, T]; as often differentiable as one likes."""
    unit, _ = directions(states, valid)
    with uncast(unit.device):
        return ((unit @ unit.mT - (1 - margin)).clamp_min(0.0) * pairs).sum()


def directions(states: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit states [B, T, M], pads zero, and norms [B, T, 1], in float32 at least."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    norm = states.square().sum(-1, keepdim=True).clamp_min(SMALLEST_NORM**2).sqrt()
    unit = states / norm
    return (unit if valid is None else unit.masked_fill(~valid[..., None], 0.0)), norm


def products_in(states: Tensor) -> torch.dtype:
    """The precision of the gradient's matrix products: that of the step. Which hinges are open is
    decided in float32 at least.
    """
    kind = states.device.type
    return (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind)
        else torch.promote_types(states.dtype, torch.float32)
    )


def uncast(device: torch.device) -> AbstractContextManager[object]:
    """Outside of autocast: half precision would blur the hinge."""
    # autocast does not know meta
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def valid_pairs(valid: Tensor) -> Tensor:
    """Pairs of different valid tokens [B, T] -> bool [B, T, T]."""
    return valid[:, :, None] & valid[:, None, :] & different(valid.shape[1], valid.device)


def different(size: int, device: torch.device) -> Tensor:
    """Pairs of different places: bool [T, T]."""
    return ~torch.eye(size, dtype=torch.bool, device=device)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the contrastive loss."""
    return [SimCtg]
