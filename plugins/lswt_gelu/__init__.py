"""The feed-forward layer without a gate, with GELU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, FeedForward


class Gelu(FeedForward):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    At the same ``d_ffn`` it has two thirds of SwiGLU's parameters: d_ffn = 6 d_model matches SwiGLU
    at 4 d_model.
    """

    name = "gelu"
    citation = """@article{hendrycks2016gelu,
  title={Gaussian Error Linear Units (GELUs)}, author={Hendrycks, Dan and Gimpel, Kevin},
  journal={arXiv preprint arXiv:1606.08415}, year={2016}}"""

    def __init__(self, dims: Dims, *, bias: bool = True) -> None:
        super().__init__(dims)
        self.fc1 = nn.Linear(dims.d_model, dims.d_ffn, bias=bias)
        self.fc2 = nn.Linear(dims.d_ffn, dims.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        return self.fc2(gelu(self.fc1(x)))


@hookimpl
def lswt_components() -> list[type]:
    """Offer the GELU layer."""
    return [Gelu]
