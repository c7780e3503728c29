"""A sequence mixer: softmax attention whose heads are scaled before the output projection."""

import torch
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, MixerParts
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention


class Example(SoftmaxAttention):
    """Every head's output times a learned factor of its own, at first 1. Extend
    ``lswt_core.interfaces.Mixer`` instead for a mixer that is not softmax attention.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        super().__init__(dims, parts)
        self.scale = nn.Parameter(torch.empty(dims.n_heads, 1))

    def reset_parameters(self) -> None:
        """Start as plain attention."""
        nn.init.ones_(self.scale)

    def combine(self, attended: Tensor, x: Tensor) -> Tensor:
        """Change this, or override another step. [B, T, H, D] -> [B, T, H, D]."""
        return attended * self.scale.to(attended.dtype)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
