"""Positional encodings, each wrong in one way."""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.interfaces import Bias, DenseBias, PositionalEncoding, SlopeBias
from mutants.meant import CITED, meant


@meant("streaming")
class Indexed(PositionalEncoding):
    """Turns tokens by their index in the tensor."""

    name, citation = "indexed", CITED

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * (1 + torch.arange(x.shape[1], dtype=x.dtype))[:, None, None]


@meant("causality")
class Averaging(PositionalEncoding):
    """Adds the mean of all tokens to the input."""

    name, citation = "averaging", CITED

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


@meant("bias")
class Unplaced(PositionalEncoding):
    """Biases by index instead of coordinate."""

    name, citation, has_bias = "unplaced", CITED, True

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias:
        return DenseBias(
            (q_positions[:, None] - torch.arange(len(k_positions))[None]).to(q.dtype) * -0.1
        )


class Lying(SlopeBias):
    """Slopes that are not what it is made of."""

    def dense(self) -> Tensor:
        return super().dense() * 2


@meant("bias")
class TwoFaced(PositionalEncoding):
    """Its bias is one thing as slopes and another as numbers."""

    name, citation, has_bias = "two-faced", CITED, True

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias:
        return Lying(torch.tensor([0.1, 0.2], dtype=q.dtype), q_positions, k_positions)
