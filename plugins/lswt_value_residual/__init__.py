"""Value residual: every layer mixes the first layer's values into its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, LayerContext, MixerParts
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention

FIRST_VALUES = "value-residual"  # [B, T, G, D] the first layer's values of the new segment


class ValueResidual(SoftmaxAttention):
    """Softmax attention with values ``lambda_1 V_1 + lambda_2 V_n`` in layer n, V_1 being the first
    layer's (ResFormer, Zhou et al. 2024, arXiv 2410.17897, with learned lambdas).

    Both lambdas are numbers of their layer and start at 1/2. The first layer of the model has none
    and must be a value residual, too; others may be of another kind. Its values of the new tokens
    are handed up; a KV cache keeps mixed values. A memory that projects earlier inputs again
    (xl-hidden, compressed) is refused above the first layer: of these tokens there are no V_1.
    """

    name = "value-residual"
    citation = """@inproceedings{zhou2025value,
  title={Value Residual Learning},
  author={Zhou, Zhanchao and Wu, Tianyi and Jiang, Zhiyun and Obeid, Fares and Lan, Zhenzhong},
  booktitle={ACL}, year={2025}}"""

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        super().__init__(dims, parts)
        self.is_first = dims.layer == 0
        if self.is_first:
            self.writes = frozenset({FIRST_VALUES})
            return
        self.reads = frozenset({FIRST_VALUES})
        self.lambdas = nn.Parameter(torch.empty(2))  # of the first layer's values and its own

    def reset_parameters(self) -> None:
        """Start at one half of each."""
        if not self.is_first:
            nn.init.constant_(self.lambdas, 0.5)

    def make_key_value(
        self, x: Tensor, k: Tensor, v: Tensor, positions: Tensor, context: LayerContext
    ) -> KeyValue:
        """Mix the first layer's values into v [B, T, G, D]."""
        if not self.is_first:
            first, own = self.lambdas.to(v.dtype)
            v = first * context.carry[FIRST_VALUES] + own * v
        return super().make_key_value(x, k, v, positions, context)

    def carry_up(self, key_values: Sequence[KeyValue]) -> Mapping[str, Any]:
        """The first layer's values of the new segment."""
        return {FIRST_VALUES: key_values[-1].v} if self.is_first else {}


@hookimpl
def lswt_components() -> list[type]:
    """Offer the value residual."""
    return [ValueResidual]
