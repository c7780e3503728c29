"""Multi-head latent attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from lswt_core.interfaces import (
    Dims,
    KeyValue,
    KVProjection,
    LayerContext,
    MixerParts,
    State,
    Unsupported,
)
from lswt_core.plugin_api.own_encoding import own_encoding
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention, split_heads
from lswt_latent_attention.decoupled import DecoupledEncoding

NORM_EPS = 1e-6  # of the authors' norms


class LatentAttention(SoftmaxAttention):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434, section 2.1).

    Every token is compressed to a latent ``c = norm(x W_dkv)`` of width ``kv_rank`` and a
    positional key ``k_r = x W_kr`` of width ``d_rope``, which all heads share. Head h has the key
    ``[c W_uk_h ; rotate(k_r)]`` and the value ``c W_uv_h``. ``q_rank`` compresses queries likewise;
    0: they are projected from x. The positional encoding acts on the last ``d_rope`` dimensions of
    queries and keys alone. ``kv_rank`` 0 stands for four head widths, ``d_rope`` 0 for half of one,
    as in the paper.

    Unlike the paper's, the positional dimensions are part of the head width d_model / n_heads, not
    added to it, so that queries, keys and values are equally wide for every attention backend.

    Memories get the tokens ``[c ; k_r]``. One that keeps inputs (xl-hidden, compressed) so keeps
    the latents, which are projected again by the current weights, with gradients; a KV cache keeps
    the projected keys and values, and saves nothing. While decoding, cached latents are projected
    as in training; W_uk and W_uv are not absorbed into the projections of queries and outputs.
    """

    name = "latent-attention"
    citation = """@article{deepseek2024v2,
  title={DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model},
  author={{DeepSeek-AI}}, journal={arXiv preprint arXiv:2405.04434}, year={2024}}"""

    def __init__(
        self,
        dims: Dims,
        parts: MixerParts,
        *,
        kv_rank: Annotated[int, Ge(0)] = 0,
        q_rank: Annotated[int, Ge(0)] = 0,
        d_rope: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__(dims, parts)
        self.kv_rank = kv_rank or 4 * dims.d_head
        self.d_rope = d_rope or dims.d_head // 2
        if not 0 < self.d_rope < dims.d_head:
            raise Unsupported(
                f"latent-attention's d_rope = {self.d_rope} is a part of the head width"
                f" d_model / n_heads = {dims.d_head}: choose one between 1 and {dims.d_head - 1}"
            )
        rotated = dims._replace(d_model=dims.n_heads * self.d_rope)
        self.positional = DecoupledEncoding(own_encoding(self.name, parts, rotated), self.d_rope)
        if q_rank:
            self.query = LowRank(dims.d_model, q_rank, dims.d_model, dims.bias)  # type: ignore[assignment]
        self.compress = nn.Linear(dims.d_model, self.kv_rank + self.d_rope, bias=dims.bias)
        self.latent_norm = nn.RMSNorm(self.kv_rank, eps=NORM_EPS)
        d_key = dims.d_head - self.d_rope
        self.key = nn.Linear(self.kv_rank, dims.n_kv_heads * d_key, bias=dims.bias)
        self.value = nn.Linear(self.kv_rank, dims.n_kv_heads * dims.d_head, bias=dims.bias)

    def key_values(
        self, x: Tensor, state: Mapping[str, State], context: LayerContext, project: KVProjection
    ) -> tuple[list[KeyValue], dict[str, State]]:
        """Compress x [B, T, M], and call the memories around the projection of latents."""
        c, k_r = self.compress(x).split((self.kv_rank, self.d_rope), dim=-1)
        latents = torch.cat((norm_as(self.latent_norm, c), k_r), dim=-1)
        return super().key_values(latents, state, context, partial(self.expand, context))

    def expand(self, context: LayerContext, latents: Tensor, positions: Tensor) -> list[KeyValue]:
        """Keys and values of latents [B, N, kv_rank + d_rope] at positions [N]."""
        c, k_r = latents.split((self.kv_rank, self.d_rope), dim=-1)
        own = split_heads(self.key(c), self.n_kv_heads)  # [B, N, G, D - d_rope]
        v = split_heads(self.value(c), self.n_kv_heads)  # [B, N, G, D]
        shared = k_r[:, :, None].expand(-1, -1, self.n_kv_heads, -1).to(own.dtype)
        k = torch.cat((own, shared), dim=-1)  # [B, N, G, D]
        return [self.make_key_value(latents, k, v, positions, context)]


class LowRank(nn.Module):
    """Two linear layers with an RMSNorm between them, through a narrow vector."""

    def __init__(self, d_in: int, rank: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(d_in, rank, bias=bias)
        self.norm = nn.RMSNorm(rank, eps=NORM_EPS)
        self.up = nn.Linear(rank, d_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        out: Tensor = self.up(norm_as(self.norm, self.down(x)))
        return out


def norm_as(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Norm x [..., R] in the dtype of the norm's weight; the result has that of x."""
    out: Tensor = norm(x.to(norm.weight.dtype))
    return out.to(x.dtype)
