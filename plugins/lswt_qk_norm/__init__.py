"""Normalisation of queries and keys per head (QK-norm)."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, QKNorm


class NoNorm(QKNorm):
    """No QK-norm."""

    name = "none"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, D]."""
        return x


class RmsHeadNorm(QKNorm):
    """x / (rms(x) + eps) * weight over the head width, with a weight [H, D] (query-key
    normalisation, Henry et al. 2020, arXiv 2010.04245, as RMSNorm, Zhang and Sennrich 2019, arXiv
    1910.07467).

    As in the LSWTransformer's later version, eps is added to the root, and registers are not
    normalised.
    """

    name = "rms"
    citation = """@inproceedings{henry2020query,
  title={Query-Key Normalization for Transformers},
  author={Henry, Alex and Dachapally, Prudhvi Raj and Pawar, Shubham Shantaram and Chen, Yuxuan},
  booktitle={Findings of EMNLP}, year={2020}}
@inproceedings{zhang2019root,
  title={Root Mean Square Layer Normalization}, author={Zhang, Biao and Sennrich, Rico},
  booktitle={NeurIPS}, year={2019}}"""

    def __init__(self, dims: Dims, *, eps: Annotated[float, Gt(0)] = 1e-5) -> None:
        super().__init__(dims)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dims.n_heads, dims.d_head))  # [H, D]
        self.no_weight_decay = ("weight",)

    def reset_parameters(self) -> None:
        """Start at 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> [B, N, H, D], computed in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.square().mean(-1, keepdim=True)  # [B, N, H, 1]
        # the root has no derivative at 0
        root = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
        return (wide / (root + self.eps) * self.weight).to(x.dtype)


@hookimpl
def lswt_components() -> list[type]:
    """Offer QK-norms."""
    return [NoNorm, RmsHeadNorm]
