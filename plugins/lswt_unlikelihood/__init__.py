"""Unlikelihood training: lowers the probability of repeating tokens of the context."""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import IGNORE, AuxiliaryLoss, Batch, LossSum, Output

MIN_COMPLEMENT = 1e-5  # of 1 - p, so that the logarithm and its gradient stay finite


class Unlikelihood(AuxiliaryLoss):
    """-sum over c in C_t of log(1 - p_t(c)), averaged over predicted labels; C_t is the set of
    tokens before the label of t, except the label itself (Welleck et al. 2019, arXiv 1908.04319,
    eq. 3 to 5, token level). ``weight`` is the paper's alpha, there 1.

    Candidates are the tokens of the row's segment up to t, without padding and, under document
    masking, without tokens of other documents; memories do not count. 1 - p is clamped to at least
    1e-5, as in the authors' code. Logits [B, T, V] are held until the backward pass. Computed in
    float32 at least.
    """

    name = "unlikelihood"
    needs = frozenset({"logits"})
    citation = """@inproceedings{welleck2020neural,
  title={Neural Text Generation with Unlikelihood Training},
  author={Welleck, Sean and Kulikov, Ilia and Roller, Stephen and Dinan, Emily and Cho, Kyunghyun
    and Weston, Jason},
  booktitle={ICLR}, year={2020}, note={arXiv 1908.04319}}"""

    def forward(self, out: Output, batch: Batch) -> LossSum:
        """The unlikelihood of all candidates of predicted labels, and the number of labels."""
        assert out.logits is not None
        logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))  # [B, T, V]
        # [B, T, T], the row's tokens for every t
        tokens = batch.inputs[:, None, :].expand(-1, logits.shape[1], -1)
        log_p = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)  # [B, T, T]
        costs = -torch.log1p(-log_p.exp().clamp_max(1 - MIN_COMPLEMENT))
        return LossSum(costs.masked_fill(~candidates(batch), 0.0).sum(), self.count(batch))


def candidates(batch: Batch) -> Tensor:
    """Whether the token at j is a candidate at t: bool [B, t, j]. Of equal tokens up to t only the
    last one is.
    """
    inputs, labels = batch.inputs, batch.labels
    length = inputs.shape[1]
    positions = torch.arange(length, device=inputs.device)
    valid = torch.ones_like(inputs, dtype=torch.bool) if batch.valid is None else batch.valid
    repeated = (
        (inputs[:, :, None] == inputs[:, None, :])
        & valid[:, None, :]
        & (positions > positions[:, None])
    )  # [B, j, k]: the token at j occurs again at k
    next_occurrence = positions.where(repeated, length).amin(-1)  # [B, j]
    chosen = (
        valid[:, None, :]
        & (positions <= positions[:, None])
        & (positions[:, None] < next_occurrence[:, None, :])
    )
    chosen &= (inputs[:, None, :] != labels[:, :, None]) & (labels != IGNORE)[:, :, None]
    if batch.first_visible is not None:
        chosen &= positions >= batch.first_visible[:, :, None]
    return chosen


@hookimpl
def lswt_components() -> list[type]:
    """Offer the unlikelihood loss."""
    return [Unlikelihood]
