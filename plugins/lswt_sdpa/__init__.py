"""Attention by torch's fused scaled-dot-product kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, Dims, Need, Part, Unsupported
from lswt_core.parts import join

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Sdpa(AttentionBackend):
    """torch's fused attention (Dao et al. 2022, arXiv 2205.14135), each part by itself or all in one call.

    ``method`` "split" runs every part with its own unmasked or square causal kernel and merges them by log-sum-exp: no mask,
    no copy of the remembered keys. It exists on CPU. "joint" puts the parts side by side under one mask and works everywhere.
    "auto" splits on CPU where no part has a bias or hides keys, else joins.
    """

    name = "sdpa"
    citation = """@inproceedings{dao2022flashattention,
  title={FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness},
  author={Dao, Tri and Fu, Daniel Y. and Ermon, Stefano and Rudra, Atri and R{\\'e}, Christopher},
  booktitle={NeurIPS}, year={2022}}"""

    def __init__(self, dims: Dims, *, method: Literal["auto", "split", "joint"] = "auto") -> None:
        super().__init__(dims)
        self.method = method

    def require(self, need: Need) -> None:
        """The fused kernels have one derivative; the split exists on CPU and without masks."""
        if need.twice:
            raise Unsupported("torch's fused attention kernels have no second derivative; use attention 'eager'")
        if self.method == "split" and (need.device != "cpu" or need.biased or need.bounded):
            raise Unsupported("method = 'split' runs on CPU, without position biases, windows and parted documents; use 'auto'")

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """One softmax over the union of parts: -> [B, T, H, D]."""
        plain = all(part.bias is None and part.starts is None for part in parts)
        if self.method != "joint" and plain and parts[0].q.device.type in ("cpu", "meta"):  # meta: planning, nothing is computed
            heads_first = [tensor.transpose(1, 2) for part in parts for tensor in (part.q, part.k, part.v)]
            return Split.apply([part.causal for part in parts], *heads_first).transpose(1, 2)
        return self.joint(parts)

    def joint(self, parts: Sequence[Part]) -> Tensor:
        """All parts in one call under one mask."""
        width = parts[0].v.shape[-1]
        square = len(parts) == 1 and parts[0].causal and parts[0].bias is None and parts[0].starts is None
        q, k, v, mask = join(parts)
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if square else mask,
            is_causal=square,  # top-left aligned, which is right only for a square
            scale=width**-0.5,
        )
        return out.transpose(1, 2)[..., :width]


class Split(torch.autograd.Function):
    """Attention part by part, merged by log-sum-exp; exact, since each part's backward is given the merged output and sum.

    With lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i; the gradient of a part depends on the others only
    through out and lse (the algebra of FlashAttention's backward, Dao et al. 2022, appendix B.4).
    """

    @staticmethod
    def forward(ctx: Any, causal: list[bool], *tensors: Tensor) -> Tensor:
        """(q, k, v) of every part, each [B, H, T or N, D] -> [B, H, T, D]."""
        triples = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
        outs, sums = zip(*(attend(*triple, is_causal=square) for triple, square in zip(triples, causal, strict=True)), strict=True)
        total = torch.stack(sums).logsumexp(0)  # [B, H, T]
        out = sum(part * (lse - total).exp()[..., None] for part, lse in zip(outs, sums, strict=True)).to(outs[0].dtype)
        ctx.save_for_backward(out, total, *tensors)
        ctx.causal = causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of every part's q, k and v."""
        out, total, *tensors = ctx.saved_tensors
        grads: list[Tensor | None] = []
        for i, square in enumerate(ctx.causal):
            grads += attend_backward(grad, *tensors[3 * i : 3 * i + 3], out, total, 0.0, square)
        wanted = ctx.needs_input_grad[1:]
        return (None, *(g if want else None for g, want in zip(grads, wanted, strict=True)))


@hookimpl
def lswt_components() -> list[type]:
    """Offer torch's attention."""
    return [Sdpa]
