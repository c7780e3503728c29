"""SimCTG: a contrastive loss on the hidden states of different tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Annotated, Any, Literal, TypeAlias

import torch
from annotated_types import Ge
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AuxiliaryLoss, Batch, Dims, LossSum, Output
from lswt_core.plugin_api.compilation import raise_recompile_limit

BLOCK = 256  # rows and columns of a tile of the cosine matrix
SMALLEST_NORM = 1e-6  # the cosine of a zero state would be NaN

# a function like `hinges_of_rows`
Hinges: TypeAlias = Callable[
    [Tensor, float, Tensor | None, Tensor | None, torch.dtype], tuple[Tensor, Tensor]
]


class SimCtg(AuxiliaryLoss):
    """max(0, margin - s(i, i) + s(i, j)) over all pairs i != j of valid tokens of a row, s the
    cosine of their final states (Su et al. 2022, arXiv 2202.06417, eq. 2), averaged over pairs.

    Padding may be anywhere: a pair counts iff both its tokens are valid. A batch without any pair
    contributes zero. Cosines are computed in float32 at least, a tile at a time: no [T, T] matrix
    is kept. Two options reproduce older code: ``pads`` "right" is the SimCTG authors', which
    compares with as many of a row's first tokens as are valid, whether these are the valid ones or
    not; ``empty`` "nan" is theirs and the LSWTransformer's, where a batch without any pair is NaN.
    """

    name = "simctg"
    citation = """@inproceedings{su2022contrastive,
  title={A Contrastive Framework for Neural Text Generation},
  author={Su, Yixuan and Lan, Tian and Wang, Yan and Yogatama, Dani and Kong, Lingpeng and
    Collier, Nigel},
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
        self.hinges: Hinges = hinges_of_rows

    def compile_kernels(self) -> None:
        """Compile what follows the cosines: one pass over them instead of six."""
        self.hinges = torch.compile(
            fused_hinges_of_rows, fullgraph=True, dynamic=True, **raise_recompile_limit()
        )

    def forward(self, out: Output, batch: Batch) -> LossSum:
        """The sum of hinges over pairs of valid tokens, and the number of pairs."""
        count = self.count(batch)
        states = out.states
        if self.margin == 0:  # exactly 0, although s(i, j) can round to more than 1
            total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
        elif self.pads == "right" or states.is_meta:
            valid = batch.valid if self.pads == "anywhere" else None
            total = dense(states, self.margin, valid, self.pairs(batch))
        else:
            total = TiledHingeSum.apply(states, self.margin, batch.valid, self.hinges)
        if self.empty == "nan":
            total = total.where(count > 0, torch.nan)
        return LossSum(total, count)

    def count(self, batch: Batch) -> Tensor:
        """Ordered pairs of different valid tokens, over all rows."""
        valid = self.valid(batch).sum(-1)  # [B], the same for every ``pads``
        return (valid * (valid - 1)).sum()

    def pairs(self, batch: Batch) -> Tensor:
        """Which pairs count: bool [B, T, T]."""
        valid = self.valid(batch)
        if self.pads == "anywhere":
            return valid_pairs(valid)
        first = self.first_tokens(batch)
        off_diagonal = different(first.shape[1], first.device)
        return (first & valid)[:, :, None] & first[:, None, :] & off_diagonal

    def valid(self, batch: Batch) -> Tensor:
        """Which tokens are not padding: bool [B, T]."""
        if batch.valid is None:
            return torch.ones_like(batch.inputs, dtype=torch.bool)
        return batch.valid

    def first_tokens(self, batch: Batch) -> Tensor:
        """The first tokens of every row, as many as are valid in it: bool [B, T]."""
        valid = self.valid(batch)
        return torch.arange(valid.shape[1], device=valid.device) < valid.sum(-1, keepdim=True)


class TiledHingeSum(torch.autograd.Function):
    """The sum of all hinges, a tile of pairs at a time; the forward pass computes the gradient,
    too, so the matrix of all pairs never exists.

    With s(i, i) = 1 a hinge is max(0, s(i, j) - (1 - margin)). Cosines are symmetric, so half of
    them are enough. With a(i, j) = 1 where the hinge is positive, else 0, the gradient at the unit
    state u_i is 2 sum_j a(i, j) u_j. It takes a matrix product only where a tile has both positive
    and zero hinges.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, margin: float, valid: Tensor | None, hinges: Hinges
    ) -> Tensor:
        """States [B, T, M], valid [B, T] or None -> []."""
        unit, norm = normalise(states, valid)
        matmul_dtype = gradient_dtype(states) if ctx.needs_input_grad[0] else None
        total, gradient = tiled_hinge_sum(unit, margin, valid, matmul_dtype, hinges)
        if gradient is not None:  # through the normalisation, where the norm is not clamped
            radial = (gradient * unit).sum(-1, keepdim=True) * (norm > SMALLEST_NORM)
            gradient = gradient.addcmul_(unit, radial, value=-1).div_(norm).to(states.dtype)
        ctx.save_for_backward(states, valid, gradient)
        ctx.margin = margin
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        """Scale the gradient of the forward pass; for second derivatives, differentiate the dense
        formula.
        """
        states, valid, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            counted = valid
            if counted is None:
                counted = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
            total = dense(states, ctx.margin, valid, valid_pairs(counted))
            return torch.autograd.grad(total, states, grad, create_graph=True)[0], None, None, None
        return gradient * grad.to(gradient.dtype), None, None, None


def tiled_hinge_sum(
    unit: Tensor,
    margin: float,
    valid: Tensor | None,
    matmul_dtype: torch.dtype | None,
    hinges: Hinges,
) -> tuple[Tensor, Tensor | None]:
    """The sum of hinges of unit states [B, T, M], and its gradient by them, with matrix products in
    a dtype (None: no gradient).
    """
    total, length = unit.new_zeros(()), unit.shape[1]
    gradient = None if matmul_dtype is None else torch.zeros_like(unit)
    rounded = unit if matmul_dtype is None else unit.to(matmul_dtype)
    with no_autocast(unit.device):
        for start in range(0, length, BLOCK):
            rows, later = slice(start, min(start + BLOCK, length)), slice(start, None)
            cosines = torch.bmm(unit[:, rows], unit[:, later].mT)  # [B, t, T - start]
            of_rows, of_later = (None if valid is None else valid[:, s] for s in (rows, later))
            share, positive = hinges(cosines, margin, of_rows, of_later, rounded.dtype)
            total += share
            if gradient is not None:
                add_gradient(gradient, unit, rounded, rows, positive)
    return total, None if gradient is None else gradient.mul_(2)


def hinges_of_rows(
    cosines: Tensor,
    margin: float,
    valid: Tensor | None,
    valid_later: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """From cosines [B, t, n] of t tokens with themselves and all later ones, which are overwritten:
    the sum of both orders' hinges, and which hinges are not zero, [B, t, n] bool (``dtype`` is not
    used).
    """
    hinge = cosines.sub_(1 - margin).clamp_min_(0.0)
    square = hinge[..., : hinge.shape[1]]
    square.diagonal(dim1=1, dim2=2).zero_()
    if valid is not None and valid_later is not None:
        hinge *= valid[:, :, None] & valid_later[:, None, :]
    # The square holds its pairs in both orders already.
    return 2 * hinge.sum() - square.sum(), hinge > 0


def fused_hinges_of_rows(
    cosines: Tensor,
    margin: float,
    valid: Tensor | None,
    valid_later: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``hinges_of_rows`` as one formula, for a compiler; which hinges are not zero is [B, t, n] of
    ``dtype``, as it is multiplied.
    """
    own, later = (torch.arange(size, device=cosines.device) for size in cosines.shape[1:])
    counted = own[:, None] != later
    if valid is not None and valid_later is not None:
        counted = counted & valid[:, :, None] & valid_later[:, None, :]
    hinge = (cosines - (1 - margin)).clamp_min(0.0).where(counted, 0.0)
    orders = torch.where(later < len(own), 1.0, 2.0)  # in which the pair is not here already
    return (hinge * orders).sum(), (hinge > 0).to(dtype)


def add_gradient(
    gradient: Tensor, unit: Tensor, rounded: Tensor, rows: slice, positive: Tensor
) -> None:
    """Add half of the gradient of some rows' hinges, of which ``positive`` [B, t, T - start] are
    not zero (bool, or 1 and 0), to the gradient [B, T, M] of both states of every pair.
    """
    for columns, all_positive in nonzero_columns(positive):
        others = slice(rows.start + columns.start, rows.start + columns.stop)
        if all_positive:
            gradient[:, rows] += unit[:, others].sum(1, keepdim=True)
            gradient[:, others] += unit[:, rows].sum(1, keepdim=True)
            continue
        factors = positive[..., columns].to(rounded.dtype)
        gradient[:, rows] += torch.bmm(factors, rounded[:, others])
        # The square holds its pairs in both orders already.
        beyond = max(rows.stop - others.start, 0)
        gradient[:, others][:, beyond:] += torch.bmm(factors[..., beyond:].mT, rounded[:, rows])


def nonzero_columns(positive: Tensor) -> Iterator[tuple[slice, bool]]:
    """Ranges of columns of hinges [B, t, n] that are not all zero, and whether all are positive:
    then the gradient is a sum of states and takes no matrix product. On devices other than the CPU
    this would synchronise; there, all columns are one range.
    """
    if positive.device.type != "cpu":
        yield slice(0, positive.shape[-1]), False
        return
    shares = [int(tile.count_nonzero()) / tile.numel() for tile in positive.split(BLOCK, -1)]

    def kind_of(tile: int) -> tuple[bool, bool]:
        return shares[tile] > 0, shares[tile] == 1

    for (any_positive, all_positive), group in groupby(range(len(shares)), kind_of):
        tiles = list(group)
        if any_positive:
            stop = min((tiles[-1] + 1) * BLOCK, positive.shape[-1])
            yield slice(tiles[0] * BLOCK, stop), all_positive


def dense(states: Tensor, margin: float, valid: Tensor | None, pairs: Tensor) -> Tensor:
    """The sum of hinges by the formula, over pairs [B, T, T]; differentiable repeatedly."""
    unit, _ = normalise(states, valid)
    with no_autocast(unit.device):
        return ((unit @ unit.mT - (1 - margin)).clamp_min(0.0) * pairs).sum()


def normalise(states: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit states [B, T, M], zero at padding, and norms [B, T, 1], in float32 at least."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    norm = states.square().sum(-1, keepdim=True).clamp_min(SMALLEST_NORM**2).sqrt()
    unit = states / norm
    if valid is not None:
        unit = unit.masked_fill(~valid[..., None], 0.0)
    return unit, norm


def gradient_dtype(states: Tensor) -> torch.dtype:
    """The dtype of the gradient's matrix products: autocast's, else the states'. Hinges themselves
    are computed in float32 at least.
    """
    device = states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(states.dtype, torch.float32)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast: cosines in half precision are too inexact for the hinge."""
    if device.type == "meta":  # which autocast does not support
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def valid_pairs(valid: Tensor) -> Tensor:
    """Pairs of different valid tokens [B, T] -> bool [B, T, T]."""
    return valid[:, :, None] & valid[:, None, :] & different(valid.shape[1], valid.device)


def different(size: int, device: torch.device) -> Tensor:
    """Pairs of different indices: bool [T, T]."""
    return ~torch.eye(size, dtype=torch.bool, device=device)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the contrastive loss."""
    return [SimCtg]
