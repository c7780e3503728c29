"""RWKV's channel mixing against a loop over tokens."""

from __future__ import annotations

from typing import Any

import torch
from helpers import DIMS, context_of, distance, tiny
from lswt_token_shift import TokenShift
from torch import Tensor

from lswt_core.interfaces import PositionalEncoding


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_token(layer: Any, x: Tensor) -> Tensor:
    """One text [T, M], token by token."""
    before, outputs = torch.zeros(DIMS.d_model, dtype=x.dtype), []
    for token in x:
        xk = token * layer.key_mix + before * (1 - layer.key_mix)
        xr = token * layer.receptance_mix + before * (1 - layer.receptance_mix)
        key = torch.clamp(layer.key.weight @ xk, min=0) ** 2
        gate = 1 / (1 + torch.exp(-layer.receptance.weight @ xr))
        outputs.append(gate * (layer.value.weight @ key))
        before = token
    return torch.stack(outputs)


def test_it_is_the_papers_recurrence_over_segments_and_documents() -> None:
    layer: Any = tiny(ffn=TokenShift).blocks[1].ffn
    with torch.no_grad():
        layer.receptance_mix.mul_(0.3)
    x, positional = normal(2, 9, DIMS.d_model), PositionalEncoding(DIMS)
    expected = torch.stack([by_token(layer, row) for row in x])
    out = layer(x, None, context_of(9, positional))
    assert distance(out.x, expected) < 1e-12 and list(out.state.shape) == [2, 1, DIMS.d_model]
    first = layer(x[:, :4], None, context_of(4, positional))
    rest = layer(x[:, 4:], first.state, context_of(5, positional))
    assert distance(torch.cat((first.x, rest.x), 1), expected) < 1e-12
    assert not rest.state.requires_grad
    # row 0: a document starts with the segment, row 1: one starts within
    borders = torch.tensor([[0] * 5, [-4, -4, 2, 2, 2]])
    parted = layer(x[:, 4:], first.state, context_of(5, positional, borders)).x
    assert distance(parted[0], by_token(layer, x[0, 4:])) < 1e-12
    assert distance(parted[1, 2:], by_token(layer, x[1, 6:])) < 1e-12
    assert distance(parted[1, :2], expected[1, 4:6]) < 1e-12


def test_the_mix_starts_as_in_the_authors_code() -> None:
    blocks: Any = tiny(ffn=TokenShift).blocks
    for layer, ratio in enumerate((1.0, 0.5)):
        mix = torch.tensor([(i / DIMS.d_model) ** ratio for i in range(DIMS.d_model)])
        assert distance(blocks[layer].ffn.key_mix, mix) < 1e-7
        assert torch.equal(blocks[layer].ffn.key_mix, blocks[layer].ffn.receptance_mix)
