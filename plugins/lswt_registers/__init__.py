"""Attention registers: a few learned keys and values that every query of a layer can attend to."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State


class Registers(Memory):
    """``count`` learned key/value pairs per head and layer, without position (the LSWTransformer's
    registers).

    They are the persistent vectors of Sukhbaatar et al. 2019 (arXiv 1907.01470), named after the
    registers of Darcet et al. 2023 (arXiv 2309.16588), which are tokens. Keys and values start as
    N(0, 1/D). ``weight_decay`` false exempts them from weight decay, which otherwise pulls them
    towards softmax-off-by-one.
    """

    name = "registers"
    citation = """@article{darcet2023vision,
  title={Vision Transformers Need Registers},
  author={Darcet, Timoth{\\'e}e and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr},
  journal={arXiv preprint arXiv:2309.16588}, year={2023}}
@article{sukhbaatar2019augmenting,
  title={Augmenting Self-attention with Persistent Memory},
  author={Sukhbaatar, Sainbayar and Grave, Edouard and Lample, Guillaume and Jegou, Herve and
    Joulin, Armand},
  journal={arXiv preprint arXiv:1907.01470}, year={2019}}"""

    def __init__(
        self, dims: Dims, *, count: Annotated[int, Ge(1)] = 16, weight_decay: bool = True
    ) -> None:
        super().__init__(dims)
        self.keys = nn.Parameter(torch.empty(count, dims.n_kv_heads, dims.d_head))  # [R, G, D]
        self.values = nn.Parameter(torch.empty(count, dims.n_kv_heads, dims.d_head))  # [R, G, D]
        self.no_weight_decay = () if weight_decay else ("keys", "values")

    def reset_parameters(self) -> None:
        """Draw keys and values from N(0, 1/D)."""
        for parameter in (self.keys, self.values):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Add the registers as sinks; there is no state."""
        blocks = project(x, positions)
        dtype, rows = blocks[-1].k.dtype, blocks[-1].k.shape[0]
        k = self.keys.to(dtype).expand(rows, -1, -1, -1)  # [B, R, G, D]
        v = self.values.to(dtype).expand(rows, -1, -1, -1)  # [B, R, G, D]
        return [KeyValue(k, v, None), *blocks], None


@hookimpl
def lswt_components() -> list[type]:
    """Offer registers."""
    return [Registers]
