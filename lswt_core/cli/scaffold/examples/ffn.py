"""A feed-forward layer: a gated linear unit with a sharper or softer gate."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, FeedForward


class Example(FeedForward):
    """fc2(value * sigmoid(``sharpness`` * gate)), value and gate the two halves of fc1(x);
    ``dims.d_ffn`` is the width after gating.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, dims: Dims, *, sharpness: Annotated[float, Gt(0)] = 1.0) -> None:
        super().__init__(dims)
        self.fc1 = nn.Linear(dims.d_model, 2 * dims.d_ffn)
        self.fc2 = nn.Linear(dims.d_ffn, dims.d_model)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        """Change this. [B, T, M] -> [B, T, M]."""
        value, gate = self.fc1(x).chunk(2, dim=-1)  # [B, T, d_ffn] each
        return self.fc2(value * torch.sigmoid(self.sharpness * gate))


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
