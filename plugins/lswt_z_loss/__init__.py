"""The z-loss: keeps the logsumexp of logits near 0, so that logits do not drift."""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AuxiliaryLoss, Batch, LossSum, Output


class ZLoss(AuxiliaryLoss):
    """(log Z)^2, Z the sum of exp(logits) of a token, averaged over predicted labels (Chowdhery et
    al. 2022, arXiv 2204.02311, section 5). The paper's ``weight`` is 1e-4.

    The cross-entropy computes the logsumexp, and no logits are held. It costs almost nothing if the
    embedding is frozen, and two thirds of the LM head's FLOPs more if it is trained. Computed in
    float32 at least.
    """

    name = "z-loss"
    needs = frozenset({"logsumexp"})
    citation = """@article{chowdhery2023palm,
  title={PaLM: Scaling Language Modeling with Pathways},
  author={Chowdhery, Aakanksha and Narang, Sharan and Devlin, Jacob and Bosma, Maarten and
    Mishra, Gaurav and others},
  journal={Journal of Machine Learning Research}, volume={24}, number={240}, year={2023},
  note={arXiv 2204.02311}}"""

    def forward(self, out: Output, batch: Batch) -> LossSum:
        """The sum of squared logsumexps over predicted labels, and their number."""
        assert out.logsumexp is not None  # 0 where nothing is predicted
        return LossSum(out.logsumexp.square().sum(), self.count(batch))


@hookimpl
def lswt_components() -> list[type]:
    """Offer the z-loss."""
    return [ZLoss]
