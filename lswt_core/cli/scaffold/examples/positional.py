"""A positional encoding: scores fall linearly with distance, in every head at another pace."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Bias, Dims, PositionalEncoding, SlopeBias


class Example(PositionalEncoding):
    """Head h (0, 1, ...) lowers its scores by ``steepest / 2^h`` for every token between query and
    key.
    """

    name = "example"
    cacheable_keys = True  # a key that was kept stays right as the stream moves on
    has_bias = True  # there is a `bias`
    citation = "@misc{lswt_example, title={lswt-example}, author={its authors}}"

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
    """What this plugin offers."""
    return [Example]
