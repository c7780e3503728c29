"""Attention with linear biases."""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Bias, Dims, PositionalEncoding, SlopeBias


class Alibi(PositionalEncoding):
    """A penalty on scores that grows with distance, at another pace in every head (Press et al. 2022, arXiv 2108.12409)."""

    name = "alibi"
    stationary = True
    biased = True
    citation = """@inproceedings{press2022train,
  title={Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation},
  author={Press, Ofir and Smith, Noah A. and Lewis, Mike}, booktitle={ICLR}, year={2022}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.n_heads = dims.n_heads

    def bias(self, q: Tensor, q_at: Tensor, k_at: Tensor) -> Bias:
        """A slope for every head."""
        return SlopeBias(torch.tensor(slopes(self.n_heads), device=q.device), q_at, k_at)


def slopes(n_heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... for n heads, a power of two; for more heads than that, every other one of the next power's."""
    power = 1 << (n_heads.bit_length() - 1)
    return [2.0 ** (-8 * (i + 1) / power) for i in range(power)] + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]


@hookimpl
def lswt_components() -> list[type]:
    """Offer ALiBi."""
    return [Alibi]
