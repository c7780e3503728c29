"""Feed-forward layers with any of the usual activations, gated and plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, gelu, mish, relu, silu, softplus

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, FeedForward

Activation = Literal["silu", "gelu", "gelu-tanh", "relu", "relu2", "sigmoid", "tanh", "softplus", "exp", "elu1", "mish", "identity"]

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu-tanh": lambda x: gelu(x, approximate="tanh"),
    "relu": relu,
    "relu2": lambda x: relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": softplus,
    "exp": torch.exp,
    "elu1": lambda x: elu(x) + 1,
    "mish": mish,
    "identity": lambda x: x,
}


class GatedLinearUnit(FeedForward):
    """fc2(value * activation(gate)), value and gate the halves of fc1(x), the gate second (Shazeer 2020, arXiv 2002.05202, eq. 5 and 6).

    ``d_ffn`` is the width after gating. Named variants: "gelu" is GEGLU, "relu" ReGLU, "sigmoid" GLU, "identity" the bilinear
    layer, "silu" what the component ``swiglu`` is.
    """

    name = "glu"
    citation = """@article{shazeer2020glu,
  title={GLU Variants Improve Transformer}, author={Shazeer, Noam}, journal={arXiv preprint arXiv:2002.05202}, year={2020}}"""

    def __init__(self, dims: Dims, *, activation: Activation = "gelu", bias: bool = True) -> None:
        super().__init__(dims)
        self.fc1 = nn.Linear(dims.d_model, 2 * dims.d_ffn, bias=bias)
        self.fc2 = nn.Linear(dims.d_ffn, dims.d_model, bias=bias)
        self.activation = FUNCTIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        value, gate = self.fc1(x).chunk(2, dim=-1)  # [B, T, d_ffn] each
        return self.fc2(value * self.activation(gate))


class Mlp(FeedForward):
    """fc2(activation(fc1(x))); "relu2" is the squared ReLU of Primer (So et al. 2021, arXiv 2109.08668)."""

    name = "mlp"
    citation = """@inproceedings{so2021primer,
  title={Primer: Searching for Efficient Transformers for Language Modeling},
  author={So, David R. and Ma{\\'n}ke, Wojciech and Liu, Hanxiao and Dai, Zihang and Shazeer, Noam and Le, Quoc V.},
  booktitle={NeurIPS}, year={2021}}"""

    def __init__(self, dims: Dims, *, activation: Activation = "relu2", bias: bool = True) -> None:
        super().__init__(dims)
        self.fc1 = nn.Linear(dims.d_model, dims.d_ffn, bias=bias)
        self.fc2 = nn.Linear(dims.d_ffn, dims.d_model, bias=bias)
        self.activation = FUNCTIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        return self.fc2(self.activation(self.fc1(x)))


@hookimpl
def lswt_components() -> list[type]:
    """Offer the generic feed-forward layers."""
    return [GatedLinearUnit, Mlp]
