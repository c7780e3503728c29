"""A norm over the model width: RMSNorm whose gain is learned as its distance from one."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, Norm


class Example(Norm):
    """``(1 + weight) * x / sqrt(mean(x^2) + eps)``, the weight starting at zero."""

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, dims: Dims, *, eps: Annotated[float, Gt(0)] = 1e-6) -> None:
        super().__init__(dims)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dims.d_model))  # [M]

    def reset_parameters(self) -> None:
        """Set initial values; the constructor runs on the meta device."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Change this. [..., M] -> [..., M], computed in the precision of the weight."""
        wide = x.to(self.weight.dtype)
        return (1 + self.weight) * wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
