"""Positional encodings with numbers in them and the scores they make, for tests."""

from __future__ import annotations

from typing import Any

import torch
from helpers import DIMS
from torch import Tensor, nn

from lswt_core.interfaces import Dims, KeyValue, PositionalEncoding


def filled(cls: Any, dims: Dims = DIMS, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """An encoding whose parameters, if it has any, are random numbers of size 1."""
    encoding = cls(dims, **options).to(dtype)
    fill(encoding)
    return encoding


def fill(encoding: nn.Module) -> None:
    """Draw its parameters, which may start at 0."""
    for parameter in encoding.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(8))


def drawn(
    size: int, seed: int, dtype: torch.dtype = torch.float64, width: int = DIMS.d_head
) -> Tensor:
    """Queries or keys [2, N, H, D]."""
    return torch.randn(
        2,
        size,
        DIMS.n_heads,
        width,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    ).to(dtype)


def scores(
    encoding: PositionalEncoding, q: Tensor, k: Tensor, q_positions: Tensor, k_positions: Tensor
) -> Tensor:
    """Products of queries and keys [B, H, T, N] and what is added to them."""
    q = encoding.scale_queries(q, q_positions, k_positions[0])
    q, k = encoding.encode(q, k, q_positions, k_positions)
    encoded = torch.einsum("bihd,bjhd->bhij", q, k)
    own = key_value(encoding, k, k_positions)
    blocks = [select_tokens(own, part) for part in ((0, -q.shape[1]), (-q.shape[1], None))]
    blocks = [block for block in blocks if block.k.shape[1]]
    biases = encoding.block_biases(q, blocks, q_positions)
    dense = [bias.dense() for bias in biases if bias is not None]
    return encoded + torch.cat(dense, -1) if dense else encoded


def select_tokens(block: KeyValue, part: tuple[int, int | None]) -> KeyValue:
    """Some tokens of a block."""
    tokens, assigned = slice(*part), block.positions
    features = None if block.features is None else block.features[:, tokens]
    assert assigned is not None
    return KeyValue(block.k[:, tokens], block.v[:, tokens], assigned[tokens], features=features)


def key_value(encoding: PositionalEncoding, k: Tensor, positions: Tensor | None) -> KeyValue:
    """Keys that are their own values, of tokens with some inputs."""
    x = torch.arange(k.shape[1] * DIMS.d_model, dtype=k.dtype).cos().view(1, -1, DIMS.d_model)
    return KeyValue(k, k, positions, features=encoding.features(x.expand(len(k), -1, -1)))
