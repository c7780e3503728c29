"""Feed-forward layers with a choice of activations, gated and plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, gelu, mish, relu, silu, softplus

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, FeedForward

Activation = Literal[
    "silu",
    "gelu",
    "gelu-tanh",
    "relu",
    "relu2",
    "sigmoid",
    "tanh",
    "softplus",
    "exp",
    "elu1",
    "mish",
    "identity",
]

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


GLU_VARIANTS = """@article{shazeer2020glu,
  title={GLU Variants Improve Transformer}, author={Shazeer, Noam},
  journal={arXiv preprint arXiv:2002.05202}, year={2020}}"""
PRIMER = """@inproceedings{so2021primer,
  title={Primer: Searching for Efficient Transformers for Language Modeling},
  author={So, David R. and Ma{\\'n}ke, Wojciech and Liu, Hanxiao and Dai, Zihang and
    Shazeer, Noam and Le, Quoc V.},
  booktitle={NeurIPS}, year={2021}}"""


class GatedLinearUnit(FeedForward):
    """fc2(value * activation(gate)), value and gate the two halves of fc1(x) (Shazeer 2020, arXiv
    2002.05202, eq. 5 and 6).

    ``d_ffn`` is the width after gating. ``activation`` "gelu" is the component ``geglu``, "relu"
    ``reglu``, "silu" ``swiglu``; "sigmoid" is the paper's GLU, "identity" its bilinear layer.
    """

    name = "glu"
    citation = GLU_VARIANTS

    def __init__(self, dims: Dims, *, activation: Activation = "gelu", bias: bool = True) -> None:
        super().__init__(dims)
        self.fc1 = nn.Linear(dims.d_model, 2 * dims.d_ffn, bias=bias)
        self.fc2 = nn.Linear(dims.d_ffn, dims.d_model, bias=bias)
        self.activation = FUNCTIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        value, gate = self.fc1(x).chunk(2, dim=-1)  # [B, T, d_ffn] each
        return self.fc2(value * self.activation(gate))


class GeGlu(GatedLinearUnit, FeedForward):
    """GEGLU: fc2(value * gelu(gate)), with the exact (erf) GELU (Shazeer 2020, arXiv 2002.05202,
    eq. 6).
    """

    name = "geglu"
    citation = GLU_VARIANTS

    def __init__(self, dims: Dims, *, bias: bool = True) -> None:
        super().__init__(dims, activation="gelu", bias=bias)


class ReGlu(GatedLinearUnit, FeedForward):
    """ReGLU: fc2(value * relu(gate)) (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    name = "reglu"
    citation = GLU_VARIANTS

    def __init__(self, dims: Dims, *, bias: bool = True) -> None:
        super().__init__(dims, activation="relu", bias=bias)


class Mlp(FeedForward):
    """fc2(activation(fc1(x))); the default is also the component ``relu2``."""

    name = "mlp"
    citation = PRIMER

    def __init__(self, dims: Dims, *, activation: Activation = "relu2", bias: bool = True) -> None:
        super().__init__(dims)
        self.fc1 = nn.Linear(dims.d_model, dims.d_ffn, bias=bias)
        self.fc2 = nn.Linear(dims.d_ffn, dims.d_model, bias=bias)
        self.activation = FUNCTIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        return self.fc2(self.activation(self.fc1(x)))


class SquaredRelu(Mlp, FeedForward):
    """Squared ReLU: fc2(relu(fc1(x))^2), the activation of Primer (So et al. 2021, arXiv
    2109.08668).

    At the same ``d_ffn`` it has two thirds of a gated layer's parameters.
    """

    name = "relu2"
    citation = PRIMER

    def __init__(self, dims: Dims, *, bias: bool = True) -> None:
        super().__init__(dims, activation="relu2", bias=bias)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the layers with a choice of activation, and named variants."""
    return [GatedLinearUnit, GeGlu, ReGlu, Mlp, SquaredRelu]
