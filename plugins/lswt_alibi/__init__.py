"""ALiBi, attention with linear biases."""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Bias, Dims, PositionalEncoding, SlopeBias


class Alibi(PositionalEncoding):
    """ALiBi: the bias -slope * distance on scores, with a fixed slope per head (Press et al. 2022,
    arXiv 2108.12409).
    """

    name = "alibi"
    cacheable_keys = True
    has_bias = True
    citation = """@inproceedings{press2022train,
  title={Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation},
  author={Press, Ofir and Smith, Noah A. and Lewis, Mike}, booktitle={ICLR}, year={2022}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.n_heads = dims.n_heads

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias:
        """The slopes of all heads, in float32 at least."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        slopes = alibi_slopes(self.n_heads, q.device).to(dtype)
        return SlopeBias(slopes, q_positions, k_positions)


def alibi_slopes(n_heads: int, device: torch.device) -> Tensor:
    """The slopes of n heads, [H] float64: 2^(-8/n), 2^(-16/n), ... if n is a power of two. Heads
    beyond the largest power of two below n get every other slope of twice that power.
    """
    power = 1 << (n_heads.bit_length() - 1)
    head = torch.arange(1, n_heads + 1, dtype=torch.float64, device=device)
    extra = -4 / power * (2 * (head - power) - 1)
    return torch.exp2(torch.where(head <= power, -8 / power * head, extra))


@hookimpl
def lswt_components() -> list[type]:
    """Offer ALiBi."""
    return [Alibi]
