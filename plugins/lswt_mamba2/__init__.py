"""Mamba-2: a selective state-space model (SSM) in place of attention."""

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


class Mamba2(Mixer):
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a state-space layer whose heads decay by one
    number a token, which makes it linear attention with a mask of decays.

    ``S_t = exp(-exp(A) s_t) S_{t-1} + s_t k_t x_t^T``, ``y_t = S_t^T q_t + D x_t``, with the step
    ``s_t = softplus(W_s u_t + d)`` per head of the layer's input u; x, k and q are the paper's X, B
    and C. They pass a causal convolution over ``convolution`` tokens and SiLU; all heads share k
    and q, of width ``d_state``. The output is gated by ``SiLU(W_z u_t)`` and RMS-normed over all
    heads. The linear layers have no bias, whatever ``model.bias`` says.

    The state is the layer's long memory: it reaches back to the beginning of the document, and
    takes the same space however long that is. Heads are ``head_width`` wide (0: as wide as
    attention's) and ``expand`` times ``d_model`` together. Unlike the authors', projections are
    separate layers instead of one, so that optimizers of matrices see each. ``kernel`` "auto" takes
    flash-linear-attention's on CUDA in half precision, if it is installed.
    """

    name = "mamba2"
    reach = None
    citation = """@inproceedings{dao2024transformers,
  title={Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality},
  author={Dao, Tri and Gu, Albert}, booktitle={ICML}, year={2024}, note={arXiv 2405.21060}}"""

    def __init__(
        self,
        dims: Dims,
        parts: MixerParts,
        *,
        d_state: Annotated[int, Ge(1), Le(1024)] = 128,
        expand: Annotated[int, Ge(1), Le(8)] = 2,
        head_width: Annotated[int, Ge(0)] = 0,
        convolution: Annotated[int, Ge(1), Le(64)] = 4,
        eps: Annotated[float, Gt(0)] = 1e-5,
        kernel: Literal["auto", "torch"] = "auto",
    ) -> None:
        super().__init__(dims, parts)
        inner, head_width = expand * dims.d_model, head_width or dims.d_head
        if inner % head_width:
            raise Unsupported(
                f"mamba2: heads of head_width = {head_width} do not fill {expand} times d_model ="
                f" {dims.d_model} evenly"
            )
        self.n_heads, self.eps = inner // head_width, eps
        self.widths = (inner, d_state, d_state)
        self.use_fla = kernel == "auto"
        self.value = nn.Linear(dims.d_model, inner, bias=False)  # x
        self.key = nn.Linear(dims.d_model, d_state, bias=False)  # B
        self.query = nn.Linear(dims.d_model, d_state, bias=False)  # C
        self.convolution = CausalConvolution(sum(self.widths), convolution, bias=True)
        self.step = nn.Linear(dims.d_model, self.n_heads, bias=False)
        self.gate = nn.Linear(dims.d_model, inner, bias=False)  # z
        self.output = nn.Linear(inner, dims.d_model, bias=False)
        self.log_rate = nn.Parameter(torch.empty(self.n_heads))  # A
        self.step_bias = nn.Parameter(torch.empty(self.n_heads))  # d
        self.skip = nn.Parameter(torch.empty(self.n_heads))  # D
        self.norm_weight = nn.Parameter(torch.empty(inner))

    def reset_parameters(self) -> None:
        """As the authors: exp(A) uniform in (1, 16), softplus(d) log-uniform in (0.001, 0.1)."""
        step = torch.exp(torch.empty(self.n_heads).uniform_(-3, -1) * math.log(10))
        with torch.no_grad():
            self.log_rate.copy_(torch.empty(self.n_heads).uniform_(1, 16).log())
            self.step_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus inverted
            self.skip.fill_(1)
            self.norm_weight.fill_(1)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]; the state is {"recurrent": [B, H, d_state, V], "tail": the last
        inputs of the convolution}.
        """
        x, state = cast_for_autocast(x), state or {}
        first = first_seen(context)
        mixed = torch.cat((self.value(x), self.key(x), self.query(x)), dim=-1)
        convolved, tail = self.convolution(mixed, state.get("tail"), first)
        values, k, q = silu(convolved).split(self.widths, dim=-1)
        v = split_heads(values, self.n_heads)
        step = softplus(at_least_float32(self.step(x)) + self.step_bias)  # [B, T, H]
        k, q = (t[:, :, None].expand(-1, -1, self.n_heads, -1) for t in (k, q))
        out, recurrent = linear_attention(
            q.to(mixed.dtype),
            k.to(mixed.dtype),
            (v * step[..., None]).to(mixed.dtype),
            -at_least_float32(self.log_rate).exp() * step,
            state.get("recurrent"),
            first,
            use_fla=self.use_fla,
        )
        out = (out + self.skip[:, None] * v).flatten(2)
        gated = at_least_float32(out) * silu(at_least_float32(self.gate(x)))
        normed = rms_norm(gated, gated.shape[-1:], self.norm_weight, self.eps)
        return LayerOutput(self.output(normed.to(x.dtype)), {"recurrent": recurrent, "tail": tail})


@hookimpl
def lswt_components() -> list[type]:
    """Offer Mamba-2."""
    return [Mamba2]
