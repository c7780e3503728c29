"""Attention written out in plain operations: the oracle for every other backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, Part


class Eager(AttentionBackend):
    """Scores of every part, one softmax over all of them, in float32 at least (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    Holds all scores, so memory grows with T x N; can be differentiated twice; does whatever a positional encoding asks.
    """

    name = "eager"
    citation = """@inproceedings{vaswani2017attention,
  title={Attention Is All You Need}, author={Vaswani, Ashish and others}, booktitle={NeurIPS}, year={2017}}"""

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """One softmax over the union of parts: -> [B, T, H, D]."""
        weights = torch.cat([self.scores(part) for part in parts], dim=-1).softmax(dim=-1)  # [B, H, T, sum of N]
        values = torch.cat([part.v for part in parts], dim=1).transpose(1, 2)  # [B, H, sum of N, D]
        return (weights.to(values.dtype) @ values).transpose(1, 2)

    def scores(self, part: Part) -> Tensor:
        """Scaled, biased and masked scores of one part, [B, H, T, N]."""
        q, k = part.q.transpose(1, 2), part.k.transpose(1, 2)
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        if part.bias is not None:
            scores = scores + part.bias.dense()
        visible = part.visible()
        return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the plain backend."""
    return [Eager]
