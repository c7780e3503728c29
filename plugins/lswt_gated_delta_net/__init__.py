"""Gated DeltaNet: a linear recurrence in place of attention."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    Dims,
    LayerContext,
    LayerOutput,
    Mixer,
    MixerParts,
    State,
    Unsupported,
)
from lswt_core.plugin_api.linear_attention import linear_attention
from lswt_core.plugin_api.recurrence import CausalConvolution, at_least_float32, first_seen
from lswt_core.plugin_api.softmax_attention import cast_for_autocast, split_heads


class GatedDeltaNet(Mixer):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): every head keeps one matrix, which
    forgets by a gate and is corrected under each key by what it does not yet say.

    ``S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T``, ``o_t = S_t^T q_t``, with
    ``a_t = exp(-exp(A) softplus(W_a x_t + d))`` and ``b_t = sigmoid(W_b x_t)`` per head. Queries,
    keys and values pass a causal convolution over ``convolution`` tokens and SiLU; queries and keys
    have length 1. The output is RMS-normed per head and gated by ``SiLU(W_g x_t)``. Nothing has a
    bias, whatever ``model.bias`` says.

    The state is the layer's long memory: it reaches back to the beginning of the document, and
    takes the same space however long that is. ``expand_k`` and ``expand_v`` are the widths of all
    keys and of all values as parts of ``d_model``; with their defaults, the authors', a layer has
    1.5 times the weights of attention. ``n_heads`` = 0: as many heads as attention has, of about
    its width; the authors use fewer and wider ones, which keep more. ``negative_eigenvalues``
    doubles b_t, so that a state can change its sign (Grazzi et al. 2024, arXiv 2411.12537).
    ``kernel`` "auto" takes flash-linear-attention's on CUDA in half precision, if it is installed.
    """

    name = "gated-delta-net"
    reach = None
    citation = """@inproceedings{yang2025gated,
  title={Gated Delta Networks: Improving Mamba2 with Delta Rule},
  author={Yang, Songlin and Kautz, Jan and Hatamizadeh, Ali},
  booktitle={ICLR}, year={2025}, note={arXiv 2412.06464}}"""

    def __init__(
        self,
        dims: Dims,
        parts: MixerParts,
        *,
        n_heads: Annotated[int, Ge(0)] = 0,
        expand_k: Annotated[float, Gt(0), Le(8)] = 0.75,
        expand_v: Annotated[float, Gt(0), Le(8)] = 1.5,
        convolution: Annotated[int, Ge(1), Le(64)] = 4,
        negative_eigenvalues: bool = False,
        eps: Annotated[float, Gt(0)] = 1e-5,
        kernel: Literal["auto", "torch"] = "auto",
    ) -> None:
        super().__init__(dims, parts)
        self.n_heads, self.eps = n_heads or dims.n_heads, eps
        keys, values = (whole_width(dims, part, self.n_heads) for part in (expand_k, expand_v))
        self.widths = (keys, keys, values)
        self.largest_write = 2.0 if negative_eigenvalues else 1.0
        self.use_fla = kernel == "auto"
        self.query = nn.Linear(dims.d_model, keys, bias=False)
        self.key = nn.Linear(dims.d_model, keys, bias=False)
        self.value = nn.Linear(dims.d_model, values, bias=False)
        self.convolution = CausalConvolution(sum(self.widths), convolution)
        self.decay = nn.Linear(dims.d_model, self.n_heads, bias=False)
        self.write = nn.Linear(dims.d_model, self.n_heads, bias=False)
        self.gate = nn.Linear(dims.d_model, values, bias=False)
        self.output = nn.Linear(values, dims.d_model, bias=False)
        self.log_rate = nn.Parameter(torch.empty(self.n_heads))  # A
        self.decay_bias = nn.Parameter(torch.empty(self.n_heads))  # d
        self.norm_weight = nn.Parameter(torch.empty(values // self.n_heads))

    def reset_parameters(self) -> None:
        """As the authors: exp(A) uniform in (0, 16), softplus(d) log-uniform in (0.001, 0.1)."""
        step = torch.exp(torch.empty(self.n_heads).uniform_(-3, -1) * math.log(10))
        with torch.no_grad():
            self.log_rate.copy_(torch.empty(self.n_heads).uniform_(0.01, 16).log())
            self.decay_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus inverted
            self.norm_weight.fill_(1)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]; the state is {"recurrent": [B, H, K, V], "tail": the last inputs
        of the convolution}.
        """
        x, state = cast_for_autocast(x), state or {}
        first = first_seen(context)
        mixed = torch.cat((self.query(x), self.key(x), self.value(x)), dim=-1)
        convolved, tail = self.convolution(mixed, state.get("tail"), first)
        parts = silu(convolved).split(self.widths, dim=-1)
        q, k, v = (split_heads(part, self.n_heads) for part in parts)
        q, k = unit_length(q) * q.shape[-1] ** -0.5, unit_length(k)
        rate = -at_least_float32(self.log_rate).exp()
        out, recurrent = linear_attention(
            q.to(mixed.dtype),
            k.to(mixed.dtype),
            v.to(mixed.dtype),
            rate * softplus(at_least_float32(self.decay(x)) + self.decay_bias),
            state.get("recurrent"),
            first,
            write=self.largest_write * at_least_float32(self.write(x)).sigmoid(),
            use_fla=self.use_fla,
        )
        normed = rms_norm(at_least_float32(out), out.shape[-1:], self.norm_weight, self.eps)
        gated = normed.flatten(2) * silu(at_least_float32(self.gate(x)))
        return LayerOutput(self.output(gated.to(x.dtype)), {"recurrent": recurrent, "tail": tail})


def whole_width(dims: Dims, part: float, n_heads: int) -> int:
    """A part of d_model, which n_heads must divide."""
    width = round(dims.d_model * part)
    if not width or width % n_heads:
        raise Unsupported(
            f"gated-delta-net: {part} of d_model = {dims.d_model} is {width}, which {n_heads} heads"
            " do not share evenly; choose another expand_k, expand_v or n_heads"
        )
    return width


def unit_length(x: Tensor) -> Tensor:
    """Vectors [..., K] over their lengths, in float32 or wider."""
    x = at_least_float32(x)
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


@hookimpl
def lswt_components() -> list[type]:
    """Offer Gated DeltaNet."""
    return [GatedDeltaNet]
