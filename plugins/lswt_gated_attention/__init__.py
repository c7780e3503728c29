"""Gated attention: a sigmoid between the softmax and the output projection."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, MixerParts
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention


class GatedAttention(SoftmaxAttention):
    """Softmax attention whose heads are gated by the query's token: ``attended * sigmoid(x W)``
    before the output projection (Qiu et al. 2025, arXiv 2505.06708, the gate at G1).

    x are the layer's normed inputs. "elementwise" has a gate for every number of every head,
    "headwise" one for each head. As in the paper the gate is linear, without bias, specific to its
    head, and multiplies. It starts like any other projection: gates are close to 1/2, which the
    output projection learns to make up for.
    """

    name = "gated-attention"
    citation = """@inproceedings{qiu2025gated,
  title={Gated Attention for Large Language Models: Non-linearity, Sparsity, and
    Attention-Sink-Free},
  author={Qiu, Zihan and Wang, Zekun and Zheng, Bo and Huang, Zeyu and Wen, Kaiyue and
    Yang, Songlin and Men, Rui and Yu, Le and Huang, Fei and Huang, Suozhi and Liu, Dayiheng and
    Zhou, Jingren and Lin, Junyang},
  booktitle={NeurIPS}, year={2025}}"""

    def __init__(
        self,
        dims: Dims,
        parts: MixerParts,
        *,
        granularity: Literal["elementwise", "headwise"] = "elementwise",
    ) -> None:
        super().__init__(dims, parts)
        per_head = dims.d_head if granularity == "elementwise" else 1
        self.gate = nn.Linear(dims.d_model, dims.n_heads * per_head, bias=False)

    def combine(self, attended: Tensor, x: Tensor) -> Tensor:
        """Gate the heads' outputs [B, T, H, D] by the inputs x [B, T, M]."""
        gate = self.gate(x).sigmoid().unflatten(-1, (self.n_heads, -1))  # [B, T, H, D or 1]
        return attended * gate


@hookimpl
def lswt_components() -> list[type]:
    """Offer gated attention."""
    return [GatedAttention]
