"""The z-loss: keeps the softmax's normaliser near one, so that logits do not drift."""

from __future__ import annotations

import torch

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import IGNORE, AuxiliaryLoss, Batch, Output, Term


class ZLoss(AuxiliaryLoss):
    """(log Z)^2, Z the sum of exp(logits) of a token, averaged over predicted labels (Chowdhery et al. 2022, arXiv 2204.02311,
    section 5). The paper's ``weight`` is 1e-4.

    It needs every logit: [B, T, V] is held until the backward pass, where cross-entropy alone would hold a chunk of it. Computed
    in float32 at least.
    """

    name = "z-loss"
    needs = frozenset({"logits"})
    citation = """@article{chowdhery2023palm,
  title={PaLM: Scaling Language Modeling with Pathways},
  author={Chowdhery, Aakanksha and Narang, Sharan and Devlin, Jacob and Bosma, Maarten and Mishra, Gaurav and others},
  journal={Journal of Machine Learning Research}, volume={24}, number={240}, year={2023}, note={arXiv 2204.02311}}"""

    def forward(self, out: Output, batch: Batch) -> Term:
        """Squared log-normalisers of predicted labels, and their number."""
        assert out.logits is not None
        logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))  # [B, T, V]
        squares = logits.logsumexp(-1).square()  # [B, T]
        return Term(squares.masked_fill(batch.labels == IGNORE, 0.0).sum(), self.count(batch))


@hookimpl
def lswt_components() -> list[type]:
    """Offer the z-loss."""
    return [ZLoss]
