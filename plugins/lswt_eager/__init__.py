"""Attention written out in plain operations: the oracle for every other backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, KVBlock
from lswt_core.plugin_api.attention import attention_scores


class Eager(AttentionBackend):
    """Scores of every part, one softmax over all of them, in float32 at least (Vaswani et al. 2017,
    arXiv 1706.03762, eq. 1).

    Holds all scores, so memory grows with T x N; can be differentiated twice; does whatever a
    positional encoding asks.
    """

    name = "eager"
    citation = """@inproceedings{vaswani2017attention,
  title={Attention Is All You Need}, author={Vaswani, Ashish and others}, booktitle={NeurIPS}, year={2017}}"""

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        """One softmax over the union of parts: -> [B, T, H, D]."""
        # [B, H, T, sum of N]
        weights = torch.cat([attention_scores(part) for part in parts], dim=-1).softmax(dim=-1)
        values = torch.cat([part.v for part in parts], dim=1).transpose(1, 2)  # [B, H, sum of N, D]
        return (weights.to(values.dtype) @ values).transpose(1, 2)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the plain backend."""
    return [Eager]
