"""A positional encoding: a bias linear in the distance, with another slope in every head."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Bias, Dims, PositionalEncoding, SlopeBias


class Example(PositionalEncoding):
    """Adds ``-steepest / 2^h * distance`` to the scores of head h (0, 1, ...)."""

    name = "example"
    cacheable_keys = True  # keys in a KV cache stay valid as the stream moves on
    has_bias = True  # `bias` returns a bias
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, dims: Dims, *, steepest: Annotated[float, Gt(0)] = 0.5) -> None:
        super().__init__(dims)
        self.slopes = [steepest / 2**head for head in range(dims.n_heads)]

    def bias(self, q: Tensor, q_positions: Tensor, k_positions: Tensor) -> Bias:
        """Change this, or override ``embed``, ``rotate`` or ``encode`` instead. q [B, T, H, D],
        q_positions [T], k_positions [N].
        """
        return SlopeBias(torch.tensor(self.slopes, device=q.device), q_positions, k_positions)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
