"""Positional encodings with one mistake each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.interfaces import Bias, DenseBias, KeyValue, PositionalEncoding, SlopeBias
from mutants.expected import CITATION, caught_by


@caught_by("segment invariance")
class RotatesByIndex(PositionalEncoding):
    """Scales tokens by their index in the tensor, not by position."""

    name, citation = "rotates-by-index", CITATION

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * (1 + torch.arange(x.shape[1], dtype=x.dtype))[:, None, None]


@caught_by("causality")
class Averaging(PositionalEncoding):
    """Adds the mean over all tokens to the input."""

    name, citation = "averaging", CITATION

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


@caught_by("attention bias")
class BiasByIndex(PositionalEncoding):
    """Its bias depends on the index of a key, not on its position."""

    name, citation, has_bias = "bias-by-index", CITATION, True

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias:
        distance = q_positions[:, None] - torch.arange(len(k_positions))[None]
        return DenseBias(distance.to(q.dtype) * -0.1)


class InconsistentBias(SlopeBias):
    """Its dense form does not match its slopes."""

    def dense(self) -> Tensor:
        return super().dense() * 2


@caught_by("attention bias")
class DenseUnlikeSlopes(PositionalEncoding):
    """Its bias differs between slopes and dense form."""

    name, citation, has_bias = "dense-unlike-slopes", CITATION, True

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias:
        return InconsistentBias(torch.tensor([0.1, 0.2], dtype=q.dtype), q_positions, k_positions)


@caught_by("attention bias")
class CountsWithinBlocks(PositionalEncoding):
    """Its bias counts keys from the start of each block."""

    name, citation, has_bias = "counts-within-blocks", CITATION, True

    def block_biases(
        self, q: Tensor, keys: Sequence[KeyValue], q_positions: Tensor
    ) -> Sequence[Bias | None]:
        sizes = [kv.k.shape[1] for kv in keys if kv.positions is not None]
        return [DenseBias(torch.arange(size, dtype=q.dtype)[None] * 0.1) for size in sizes]


@caught_by("long sequences")
class EndsAtThousand(PositionalEncoding):
    """Its bias takes positions beyond 1,000 for 1,000."""

    name, citation, has_bias = "ends-at-thousand", CITATION, True

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias:
        distance = q_positions.clamp(max=1000)[:, None] - k_positions.clamp(max=1000)[None]
        return DenseBias(distance.to(q.dtype) * -0.001)
