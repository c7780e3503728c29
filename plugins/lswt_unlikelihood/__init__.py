"""Unlikelihood training: what a text has said already is made less likely to be said again."""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import IGNORE, AuxiliaryLoss, Batch, LossSum, Output

SMALLEST_REST = 1e-5  # 1 - p is no smaller: the logarithm, and its gradient, stay finite


class Unlikelihood(AuxiliaryLoss):
    """-sum over c in C_t of log(1 - p_t(c)), averaged over predicted labels; C_t the set of tokens
    before the label of t, the label itself excepted (Welleck et al. 2019, arXiv 1908.04319, eq. 3
    to 5, token level). ``weight`` is the paper's alpha, there 1.

    Candidates are the tokens of the row and segment up to t: pads are none, nor is another
    document's token where documents are parted, nor what only a memory knows. 1 - p is taken to be
    at least 1e-5, as in the authors' code. It needs every logit: [B, T, V] is held until the
    backward pass. Computed in float32 at least.
    """

    name = "unlikelihood"
    needs = frozenset({"logits"})
    citation = """@inproceedings{welleck2020neural,
  title={Neural Text Generation with Unlikelihood Training},
  author={Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun and Weston, Jason},
  booktitle={ICLR}, year={2020}, note={arXiv 1908.04319}}"""

    def forward(self, out: Output, batch: Batch) -> LossSum:
        """Unlikelihood of every candidate of every predicted label, and the number of those labels."""
        assert out.logits is not None
        logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))  # [B, T, V]
        # [B, T, T], the row's tokens for every t
        said = batch.inputs[:, None, :].expand(-1, logits.shape[1], -1)
        log_p = logits.gather(-1, said) - logits.logsumexp(-1, keepdim=True)  # [B, T, T]
        costs = -torch.log1p(-log_p.exp().clamp_max(1 - SMALLEST_REST))
        return LossSum(costs.masked_fill(~candidates(batch), 0.0).sum(), self.count(batch))


def candidates(batch: Batch) -> Tensor:
    """Whether the label of t makes the token at j less likely: bool [B, t, j]. Of equal tokens
    before t only the last one does.
    """
    inputs, labels = batch.inputs, batch.labels
    length = inputs.shape[1]
    positions = torch.arange(length, device=inputs.device)
    valid = torch.ones_like(inputs, dtype=torch.bool) if batch.valid is None else batch.valid
    again = (
        (inputs[:, :, None] == inputs[:, None, :])
        & valid[:, None, :]
        & (positions > positions[:, None])
    )  # [B, j, k]: j's token returns at k
    following = positions.where(again, length).amin(-1)  # [B, j], where it returns first
    chosen = (
        valid[:, None, :]
        & (positions <= positions[:, None])
        & (positions[:, None] < following[:, None, :])
    )
    chosen &= (inputs[:, None, :] != labels[:, :, None]) & (labels != IGNORE)[:, :, None]
    return (
        chosen
        if batch.first_visible is None
        else chosen & (positions >= batch.first_visible[:, :, None])
    )


@hookimpl
def lswt_components() -> list[type]:
    """Offer the unlikelihood loss."""
    return [Unlikelihood]
