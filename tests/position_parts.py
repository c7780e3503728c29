"""Positional encodings with numbers in them and the scores they make, for tests."""

from __future__ import annotations

from typing import Any

import torch
from helpers import DIMS
from torch import Tensor

from lswt_core.interfaces import Dims, PositionalEncoding


def filled(cls: Any, dims: Dims = DIMS, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """An encoding whose parameters, if it has any, are random numbers of size 1."""
    encoding = cls(dims, **options).to(dtype)
    for parameter in encoding.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(8))
    return encoding


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
    encoded = torch.einsum("bihd,bjhd->bhij", *encoding.encode(q, k, q_positions, k_positions))
    bias = encoding.bias(q, q_positions, k_positions)
    return encoded if bias is None else encoded + bias.dense()
