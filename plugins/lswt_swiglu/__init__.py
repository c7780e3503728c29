"""SwiGLU, the LSWTransformer's feed-forward layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, FeedForward


class SwiGlu(FeedForward):
    """SwiGLU: fc2(value * silu(gate)), value and gate the two halves of fc1(x) (Shazeer 2020, arXiv
    2002.05202, eq. 6).

    ``d_ffn`` is the width after gating, so fc1 has twice as many outputs; the gate is the second
    half, as in the original LSWTransformer (Llama puts it first).
    """

    name = "swiglu"
    citation = """@article{shazeer2020glu,
  title={GLU Variants Improve Transformer}, author={Shazeer, Noam},
  journal={arXiv preprint arXiv:2002.05202}, year={2020}}"""

    def __init__(self, dims: Dims, *, bias: bool = True) -> None:
        super().__init__(dims)
        self.fc1 = nn.Linear(dims.d_model, 2 * dims.d_ffn, bias=bias)
        self.fc2 = nn.Linear(dims.d_ffn, dims.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        value, gate = self.fc1(x).chunk(2, dim=-1)  # [B, T, d_ffn] each
        return self.fc2(value * silu(gate))


@hookimpl
def lswt_components() -> list[type]:
    """Offer SwiGLU."""
    return [SwiGlu]
