"""Normalisation layers, from torch.

Both compute in the dtype of their weights, float32 in a run: so their output, and with it the
residual stream, is float32 under CPU autocast, too, as it is under CUDA's.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, Norm


class LayerNorm(Norm):
    """LayerNorm: standardise over the width, then weight and bias (Ba et al. 2016, arXiv
    1607.06450).
    """

    name = "layernorm"
    citation = """@article{ba2016layer,
  title={Layer Normalization}, author={Ba, Jimmy Lei and Kiros, Jamie Ryan and Hinton, Geoffrey E},
  journal={arXiv preprint arXiv:1607.06450}, year={2016}}"""

    def __init__(self, dims: Dims, *, eps: Annotated[float, Gt(0)] = 1e-5) -> None:
        super().__init__(dims)
        self.norm = nn.LayerNorm(dims.d_model, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., M] -> [..., M]."""
        return self.norm(x.to(self.norm.weight.dtype))


class RmsNorm(Norm):
    """RMSNorm: divide by the root mean square over the width, then weight; no mean, no bias (Zhang
    and Sennrich 2019, arXiv 1910.07467).
    """

    name = "rmsnorm"
    citation = """@inproceedings{zhang2019root,
  title={Root Mean Square Layer Normalization}, author={Zhang, Biao and Sennrich, Rico},
  booktitle={NeurIPS}, year={2019}}"""

    def __init__(self, dims: Dims, *, eps: Annotated[float, Gt(0)] = 1e-6) -> None:
        super().__init__(dims)
        self.norm = nn.RMSNorm(dims.d_model, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., M] -> [..., M]."""
        return self.norm(x.to(self.norm.weight.dtype))


@hookimpl
def lswt_components() -> list[type]:
    """Offer torch's norms."""
    return [LayerNorm, RmsNorm]
