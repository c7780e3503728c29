"""Test tensors with fixed seeds, and how they are compared."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lswt_core.model.decoder import Decoder

VOCAB_SIZE = 29
EXACT = 1e-10  # tolerance in float64, where sums may be taken in another order


def random_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor drawn from N(0, 1); drawn in float64, so that dtypes round the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (rows, length), generator=generator)


def seed_global_generators(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def decode_segments(
    decoder: Decoder, ids: Tensor, segment: int, state: Any = None
) -> tuple[Tensor, Any]:
    """Hidden states [B, T, M] of ids [B, T] read in segments of some length, and the memories'
    state at the end.
    """
    outputs = []
    for start in range(0, ids.shape[1], segment):
        states, state = decoder(ids[:, start : start + segment], state)
        outputs.append(states)
    return torch.cat(outputs, dim=1), state


def max_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference: infinite if it is NaN anywhere, 0 for empty tensors."""
    if a.numel() == b.numel() == 0:
        return 0.0
    return float((a - b).detach().abs().nan_to_num(nan=torch.inf).max())


def describe_sums(found: float, expected: float) -> str:
    """Two sums that differ, with a hint where they differ as float32 rounds."""
    text = f"{found:.12g}, not to {expected:.12g}"
    if abs(found - expected) < 1e-5 * max(1, abs(expected)):
        text += (
            "; so small a difference is float32's: this is checked in float64, which forward must"
            " not cast to float32"
        )
    return text


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in a value: nested tuples (named ones too), lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for branch in value for tensor in tensors_in(branch)]
