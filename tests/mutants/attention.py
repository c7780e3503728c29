"""Attention backends with one mistake each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.interfaces import AttentionBackend, KVBlock
from lswt_core.plugin_api.attention import attention_scores, grouped_matmul
from mutants.expected import CITATION, caught_by


def attend(blocks: Sequence[KVBlock], all_scores: list[Tensor]) -> Tensor:
    """Softmax over the scores of all blocks, then the weighted sum of values."""
    weights = torch.cat(all_scores, -1).softmax(-1)
    values = torch.cat([block.v for block in blocks], 1).transpose(1, 2)
    return grouped_matmul(weights.to(values.dtype), values).transpose(1, 2)


@caught_by("reference")
class OffByOneMask(AttentionBackend):
    """Every token sees the next one."""

    name, citation = "off-by-one-mask", CITATION

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        all_scores = [attention_scores(block._replace(causal=False)) for block in blocks]
        length = blocks[-1].q.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(2)
        all_scores[-1] = all_scores[-1].masked_fill(hidden, -torch.inf)
        return attend(blocks, all_scores)


@caught_by("reference")
class Unscaled(AttentionBackend):
    """Scores lack the factor 1/sqrt(D)."""

    name, citation = "unscaled", CITATION

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        root = blocks[0].q.shape[-1] ** 0.5
        return attend(
            blocks, [attention_scores(block._replace(q=block.q * root)) for block in blocks]
        )


@caught_by("reference")
class NoDocumentMask(AttentionBackend):
    """Ignores document masking without refusing it in ``require``."""

    name, citation = "no-document-mask", CITATION

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        return attend(
            blocks, [attention_scores(block._replace(first_visible=None)) for block in blocks]
        )


@caught_by("reference")
class WrongGroups(AttentionBackend):
    """Query head h reads key/value head h modulo their number."""

    name, citation = "wrong-groups", CITATION

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        repeats = blocks[0].q.shape[2] // blocks[0].k.shape[2]
        tiled = [
            block._replace(k=block.k.repeat(1, 1, repeats, 1), v=block.v.repeat(1, 1, repeats, 1))
            for block in blocks
        ]
        return attend(tiled, [attention_scores(block) for block in tiled])


@caught_by("reference")
class NoTransform(AttentionBackend):
    """Ignores transforms of scores without refusing them in ``require``."""

    name, citation = "no-transform", CITATION

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        return attend(
            blocks, [attention_scores(block._replace(transform=None)) for block in blocks]
        )


@caught_by("reference")
class NoSelection(AttentionBackend):
    """Ignores selections of keys without refusing them in ``require``."""

    name, citation = "no-selection", CITATION

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        return attend(blocks, [attention_scores(block._replace(selected=None)) for block in blocks])


@caught_by("low precision")
class RoundedScores(AttentionBackend):
    """Rounds scores to multiples of 1/4 in bfloat16."""

    name, citation = "rounded-scores", CITATION

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        all_scores = [attention_scores(block) for block in blocks]
        if blocks[0].q.dtype == torch.bfloat16:
            all_scores = [(block_scores * 4).round() / 4 for block_scores in all_scores]
        return attend(blocks, all_scores)


@caught_by("long sequences")
class ScalesMany(AttentionBackend):
    """Divides scores by 2 if there are more than 256 keys."""

    name, citation = "scales-many", CITATION

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        all_scores = [attention_scores(block) for block in blocks]
        many = sum(block.k.shape[1] for block in blocks) > 256
        return attend(blocks, [scores / 2 if many else scores for scores in all_scores])


@caught_by("in-place writes")
class ScalesQueries(AttentionBackend):
    """Scales queries in place after it has used them."""

    name, citation = "scales-queries", CITATION

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        out = attend(blocks, [attention_scores(block) for block in blocks])
        blocks[-1].q.data.mul_(0.5)
        return out
