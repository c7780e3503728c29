"""Differential attention: the difference of two softmaxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, KVBlock, LayerContext, MixerParts, Unsupported
from lswt_core.plugin_api.own_encoding import own_encoding
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention


class DifferentialAttention(SoftmaxAttention):
    """Two softmaxes a head, subtracted: ``(softmax(q1 k1) - lambda softmax(q2 k2)) v``, normed head
    by head and scaled by ``1 - lambda_init`` (Ye et al. 2024, arXiv 2410.05258, eq. 1 to 3).

    ``lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init``, one number a
    layer, with ``lambda_init = 0.8 - 0.6 exp(-0.3 layer)``, layers counted from 0. Queries and keys
    of one softmax have half of the head width, values all of it; parameters are those of plain
    attention. The paper compares with plain attention of twice as many heads, so that queries are
    equally wide: halve ``model.n_heads``.

    Any attention backend runs it: twice, with both softmaxes as heads of half the width, once for
    each half of the values (the authors' multihead_flashdiff_2). Scores are so computed twice, and
    ``plan`` counts both. Memories, sinks, QK norm and positional encoding see 2 H heads of width
    D / 2; softmax s of head h in key/value group g is query head (2 g + s) H / G + h mod (H / G),
    with H = G the order of the authors' code. As there, the norm is an RMSNorm with one weight [D]
    for all heads, and lambda's vectors start as N(0, 0.01).
    """

    name = "differential-attention"
    citation = """@inproceedings{ye2025differential,
  title={Differential Transformer},
  author={Ye, Tianzhu and Dong, Li and Xia, Yuqing and Sun, Yutao and Zhu, Yi and Huang, Gao and
    Wei, Furu},
  booktitle={ICLR}, year={2025}}"""

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        if dims.d_head % 2:
            raise Unsupported(
                "differential-attention halves the head width d_model / n_heads ="
                f" {dims.d_head}, which is odd"
            )
        super().__init__(dims, parts)
        self.positional = own_encoding(self.name, parts, self.head_dims(dims))
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * dims.layer)
        self.lambda_q1 = nn.Parameter(torch.empty(self.d_head))
        self.lambda_k1 = nn.Parameter(torch.empty(self.d_head))
        self.lambda_q2 = nn.Parameter(torch.empty(self.d_head))
        self.lambda_k2 = nn.Parameter(torch.empty(self.d_head))
        self.head_norm = nn.RMSNorm(dims.d_head, eps=1e-5)

    @classmethod
    def head_dims(cls, dims: Dims) -> Dims:
        """Both softmaxes of every head as heads of half the width."""
        return dims._replace(n_heads=2 * dims.n_heads)

    def reset_parameters(self) -> None:
        """Draw lambda's vectors from N(0, 0.01)."""
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)

    def attend(self, q: Tensor, key_values: Sequence[KeyValue], context: LayerContext) -> Tensor:
        """Attend with queries [B, T, 2 H, D/2]: -> [B, T, H, D]."""
        blocks = self.encode(q, key_values, context)
        halves = [self.backend([with_half(block, i) for block in blocks]) for i in (0, 1)]
        both = torch.cat(halves, -1).to(self.head_norm.weight.dtype)  # [B, T, 2 H, D]
        # [B, T, G, H / G, D] each
        first, second = both.unflatten(2, (self.n_kv_heads // 2, 2, -1)).unbind(3)
        attended = (first - self.mixing() * second).flatten(2, 3)  # [B, T, H, D]
        return (self.head_norm(attended) * (1 - self.lambda_init)).to(q.dtype)

    def mixing(self) -> Tensor:
        """Lambda, []."""
        first = (self.lambda_q1 * self.lambda_k1).sum().exp()
        second = (self.lambda_q2 * self.lambda_k2).sum().exp()
        return first - second + self.lambda_init


def with_half(block: KVBlock, half: int) -> KVBlock:
    """A block [B, N, 2 G, D/2] whose two softmaxes attend to the same half of the values."""
    values = block.v.unflatten(2, (-1, 2))[:, :, :, half]  # [B, N, G, D/2]
    return block._replace(v=values.repeat_interleave(2, dim=2))


@hookimpl
def lswt_components() -> list[type]:
    """Offer differential attention."""
    return [DifferentialAttention]
