"""Variants of softmax attention, as parts of tiny decoders and alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from helpers import DIMS, attention_layer
from lswt_cross_layer_attention import CrossLayerAttention
from lswt_differential_attention import DifferentialAttention
from lswt_eager import Eager
from lswt_gated_attention import GatedAttention
from lswt_latent_attention import LatentAttention
from lswt_value_residual import ValueResidual
from torch import Tensor

from lswt_core.interfaces import AttentionBackend, Dims, KVBlock, MixerParts


def cross_layer(dims: Dims, parts: MixerParts) -> CrossLayerAttention:
    """Every second layer reads the one below, and keeps no tokens."""
    if dims.layer % 2 == 0:
        return CrossLayerAttention(dims, parts)
    sinks = {name: build for name, build in parts.memories.items() if not build(dims).length}
    return CrossLayerAttention(dims, parts._replace(memories=sinks), keys="below")


MIXERS: dict[str, Callable[..., Any]] = {
    "gated": GatedAttention,
    "gated by head": partial(GatedAttention, granularity="headwise"),
    "differential": DifferentialAttention,
    "latent": partial(LatentAttention, kv_rank=5, q_rank=7, d_rope=2),
    "value residual": ValueResidual,
    "cross-layer": cross_layer,
}


class Repeating(Eager, AttentionBackend):
    """Grouped key/value heads, repeated for their queries."""

    def forward(self, blocks: list[KVBlock]) -> Tensor:  # type: ignore[override]
        group = blocks[0].q.shape[2] // blocks[0].k.shape[2]
        return super().forward(
            [
                block._replace(
                    k=block.k.repeat_interleave(group, 2), v=block.v.repeat_interleave(group, 2)
                )
                for block in blocks
            ]
        )


def layer_of(mixer: Callable[..., Any], dims: Dims = DIMS, **memories: Any) -> Any:
    """One layer in float64, every parameter moved away from where it starts."""
    layer = attention_layer(memories, Repeating, mixer=mixer, dims=dims)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.empty(parameter.shape, dtype=torch.float64)
            parameter.add_(noise.normal_(std=0.3, generator=generator))
    return layer


def inputs(rows: int = 2, size: int = 5, width: int = DIMS.d_model, seed: int = 0) -> Tensor:
    """A layer's normed inputs [B, T, M] in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(rows, size, width, dtype=torch.float64).normal_(generator=generator)


def heads(x: Tensor, count: int) -> list[Tensor]:
    """[B, N, H * D] -> H times [B, N, D]."""
    return list(x.chunk(count, dim=-1))


def weights(q: Tensor, k: Tensor) -> Tensor:
    """Causal softmax weights [B, T, T] of queries and keys [B, T, D], written out."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    ahead = torch.ones(scores.shape[-2:]).triu(1).bool()
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)
