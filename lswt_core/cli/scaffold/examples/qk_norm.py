"""A norm of queries and keys: unit length times a learned gain per head."""

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, QKNorm


class Example(QKNorm):
    """``gain[h] * x / |x|`` over the head width; gains start at ``start``. Scores are bounded by
    the product of the gains.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, dims: Dims, *, start: Annotated[float, Gt(0)] = 4.0) -> None:
        super().__init__(dims)
        self.start = start
        self.gain = nn.Parameter(torch.empty(dims.n_heads))  # [H]

    def reset_parameters(self) -> None:
        """Set initial values; the constructor runs on the meta device."""
        nn.init.constant_(self.gain, self.start)

    def forward(self, x: Tensor) -> Tensor:
        """Change this. [B, N, H, D] -> [B, N, H, D], computed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (nn.functional.normalize(wide, dim=-1) * self.gain[:, None]).to(x.dtype)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
