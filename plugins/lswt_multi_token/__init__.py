"""Multi-token prediction: every hidden state predicts tokens after the next one, too."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import IGNORE, AuxiliaryLoss, Batch, Dims, LossSum, Output
from lswt_core.plugin_api.future_labels import labels_after


class FutureHead(nn.Module):
    """``x + W norm(x)``: the hidden states that one further token is predicted from."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.linear = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        return x + self.linear(self.norm(x))


class MultiToken(AuxiliaryLoss):
    """The cross-entropy of the tokens 2 to ``n_tokens`` ahead, averaged over all of them (Gloeckle
    et al. 2024, arXiv 2404.19737, eq. 2; DeepSeek-V3, arXiv 2412.19437, predicts 2 tokens). Token
    t + 1 + k is predicted from ``head_k(h_t)`` through the model's own LM head; labels reach past
    the segment's end.

    It differs from the papers in what a head is: there a transformer layer (in DeepSeek-V3 one that
    also reads the embeddings of the tokens between), here a norm and a linear layer in a residual
    branch on the normed hidden states, which adds no attention and no memory. Gloeckle et al. add
    the heads' means: their loss is ``weight`` = n_tokens - 1; DeepSeek-V3's weights are 0.3, then
    0.1. Heads are left out of export: they only serve training.

    Under document masking no label of another document is predicted. Evaluation counts the labels
    inside the segment. Each further token costs another pass through the LM head and, if the
    embedding is trained, holds one more gradient of the table until the backward pass.
    """

    name = "multi-token"
    needs = frozenset({"score"})
    citation = """@inproceedings{gloeckle2024better,
  title={Better \\& Faster Large Language Models via Multi-token Prediction},
  author={Gloeckle, Fabian and Youbi Idrissi, Badr and Rozi{\\`e}re, Baptiste and Lopez-Paz, David
    and Synnaeve, Gabriel},
  booktitle={ICML}, year={2024}, note={arXiv 2404.19737}}"""

    def __init__(self, dims: Dims, *, n_tokens: Annotated[int, Ge(2), Le(64)] = 2) -> None:
        super().__init__(dims)
        self.heads = nn.ModuleList(FutureHead(dims.d_model) for _ in range(n_tokens - 1))
        self.lookahead = n_tokens - 1

    def forward(self, out: Output, batch: Batch) -> LossSum:
        """The sum of negative log-likelihoods over heads and labels, and their number."""
        assert out.score is not None
        totals = [
            out.score(head(out.states), labels_after(batch, distance)).total
            for distance, head in enumerate(self.heads, start=1)
        ]
        return LossSum(torch.stack(totals).sum(), self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        """The number of labels that all heads predict."""
        counts = [
            (labels_after(batch, distance) != IGNORE).sum()
            for distance in range(1, self.lookahead + 1)
        ]
        return torch.stack(counts).sum()


@hookimpl
def lswt_components() -> list[type]:
    """Offer multi-token prediction."""
    return [MultiToken]
