"""SimCTG: a contrastive loss that keeps the states of different tokens apart."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AuxiliaryLoss, Batch, Dims, Output, Term

SMALLEST_NORM = 1e-6  # a zero state has no direction; without this its cosine would be NaN


class SimCtg(AuxiliaryLoss):
    """max(0, margin - s(i, i) + s(i, j)) over all pairs i != j of valid tokens of a row, s the cosine of their final states
    (Su et al. 2022, arXiv 2202.06417, eq. 2), averaged over pairs.

    Pads may stand anywhere: a pair counts iff both its tokens are valid. A batch without any pair contributes zero. Computed
    in float32 at least, on the states' own device. Two options reproduce older code: ``pads`` "right" is the SimCTG
    authors', which compares with a row's first tokens, as many as are valid, whether they are the valid ones or not; ``empty`` "nan"
    is theirs and the LSWTransformer's, where a batch without any pair is not a number.
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

    def forward(self, out: Output, batch: Batch) -> Term:
        """Hinge of every pair of valid tokens, and their number."""
        states = out.states.to(torch.promote_types(out.states.dtype, torch.float32))  # [B, T, M]
        count = self.count(batch)
        if self.margin == 0:  # s(i, j) can round above 1: without this, margin 0 would not be exactly no loss
            return Term(states.new_zeros(()), count)
        unit = states * states.square().sum(-1, keepdim=True).clamp_min(SMALLEST_NORM**2).rsqrt()
        if batch.valid is not None and self.pads == "anywhere":
            unit = unit.masked_fill(~batch.valid[..., None], 0.0)
        hinge = (cosines(unit) - (1 - self.margin)).clamp_min(0.0)  # [B, T, T]; s(i, i) = 1
        total = (hinge * self.pairs(batch)).sum()
        return Term(total.where(count > 0, torch.nan) if self.empty == "nan" else total, count)

    def count(self, batch: Batch) -> Tensor:
        """Ordered pairs of different valid tokens, over all rows."""
        valid = self.valid(batch).sum(-1)  # [B], the same whichever are taken
        return (valid * (valid - 1)).sum()

    def pairs(self, batch: Batch) -> Tensor:
        """Which pairs count: bool [B, T, T]."""
        valid = self.valid(batch)
        different = ~torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
        if self.pads == "anywhere":
            return valid[:, :, None] & valid[:, None, :] & different
        taken = self.taken(batch)
        return (taken & valid)[:, :, None] & taken[:, None, :] & different

    def valid(self, batch: Batch) -> Tensor:
        """Which tokens are not padding: bool [B, T]."""
        return torch.ones_like(batch.inputs, dtype=torch.bool) if batch.valid is None else batch.valid

    def taken(self, batch: Batch) -> Tensor:
        """As many tokens from the beginning of a row as are valid in it: bool [B, T]."""
        valid = self.valid(batch)
        return torch.arange(valid.shape[1], device=valid.device) < valid.sum(-1, keepdim=True)


def cosines(unit: Tensor) -> Tensor:
    """Cosines [B, T, T] of unit states [B, T, M], outside of autocast: half precision would blur the hinge."""
    if unit.is_meta:  # autocast does not know the device
        return unit @ unit.mT
    with torch.autocast(unit.device.type, enabled=False):
        return unit @ unit.mT


@hookimpl
def lswt_components() -> list[type]:
    """Offer the contrastive loss."""
    return [SimCtg]
