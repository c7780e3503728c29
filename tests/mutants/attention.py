"""Attention backends, each wrong in one way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.interfaces import AttentionBackend, KVBlock
from lswt_core.plugin_api.attention import attention_scores
from mutants.meant import CITED, meant


def attend(parts: Sequence[KVBlock], weights: Tensor) -> Tensor:
    """Values weighed."""
    values = torch.cat([part.v for part in parts], 1).transpose(1, 2)
    return (weights.to(values.dtype) @ values).transpose(1, 2)


@meant("oracle")
class Shifted(AttentionBackend):
    """Its mask is off by one: every token sees the next."""

    name, citation = "shifted", CITED

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        found = [attention_scores(p._replace(causal=False)) for p in parts]
        size = parts[-1].q.shape[1]
        found[-1] = found[-1].masked_fill(
            torch.ones(size, size, dtype=torch.bool).triu(2), -torch.inf
        )
        return attend(parts, torch.cat(found, -1).softmax(-1))


@meant("oracle")
class Unscaled(AttentionBackend):
    """Forgets 1/sqrt(D)."""

    name, citation = "unscaled", CITED

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        return attend(
            parts,
            torch.cat(
                [attention_scores(p._replace(q=p.q * p.q.shape[-1] ** 0.5)) for p in parts], -1
            ).softmax(-1),
        )


@meant("oracle")
class Borderless(AttentionBackend):
    """Does not keep documents apart, and does not say so."""

    name, citation = "borderless", CITED

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        return attend(
            parts,
            torch.cat(
                [attention_scores(p._replace(first_visible=None)) for p in parts], -1
            ).softmax(-1),
        )


@meant("low precision")
class Coarse(AttentionBackend):
    """Rounds its scores to bfloat16 where the input is."""

    name, citation = "coarse", CITED

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        found = torch.cat([attention_scores(p) for p in parts], -1)
        narrow = found if parts[0].q.dtype != torch.bfloat16 else (found * 4).round() / 4
        return attend(parts, narrow.softmax(-1))
