"""Attention in plain operations: the reference for every other backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, KVBlock
from lswt_core.plugin_api.attention import attention_scores, grouped_matmul


class Eager(AttentionBackend):
    """Scaled dot-product attention: one softmax over the scores of all key/value blocks, in float32
    at least (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    Holds all scores, so memory grows with T x N. Supports every bias, mask and transform, and
    second derivatives.
    """

    name = "eager"
    citation = """@inproceedings{vaswani2017attention,
  title={Attention Is All You Need}, author={Vaswani, Ashish and others},
  booktitle={NeurIPS}, year={2017}}"""

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        """One softmax over the keys of all blocks: -> [B, T, H, D]."""
        # [B, H, T, sum of N]
        weights = torch.cat([attention_scores(block) for block in blocks], dim=-1).softmax(dim=-1)
        # [B, G, sum of N, D]
        values = torch.cat([block.v for block in blocks], dim=1).transpose(1, 2)
        return grouped_matmul(weights.to(values.dtype), values).transpose(1, 2)


@hookimpl
def lswt_components() -> list[type]:
    """Offer eager attention."""
    return [Eager]
