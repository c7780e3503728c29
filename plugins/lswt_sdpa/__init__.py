"""Attention by torch's fused scaled-dot-product kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, AttentionRequirements, Dims, KVBlock, Unsupported
from lswt_core.plugin_api.attention import assume_constant_result, concatenate_blocks
from lswt_core.plugin_api.attention_merge import merged_attention
from lswt_sdpa.kernels import KERNELS, kernel_name, tried


class Sdpa(AttentionBackend):
    """torch's fused attention (Dao et al. 2022, arXiv 2205.14135), each part by itself or all in
    one call.

    ``method`` "split" runs every part with its own unmasked or square causal kernel and merges them
    by log-sum-exp: no mask, no copy of the remembered keys. On CUDA that is the first of cuDNN's
    kernel (on Hopper and newer), flash and memory-efficient attention that gives, in a small trial
    on the device, what it should; on a CPU its flash kernel. "joint" puts the parts side by side
    under one mask and works everywhere. "auto" splits where some kernel can and no part has a bias
    or hides keys, else joins.
    """

    name = "sdpa"
    citation = """@inproceedings{dao2022flashattention,
  title={FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness},
  author={Dao, Tri and Fu, Daniel Y. and Ermon, Stefano and Rudra, Atri and R{\\'e}, Christopher},
  booktitle={NeurIPS}, year={2022}}"""

    def __init__(self, dims: Dims, *, method: Literal["auto", "split", "joint"] = "auto") -> None:
        super().__init__(dims)
        self.method = method

    def require(self, need: AttentionRequirements) -> str | None:
        """The fused kernels have one derivative; the split exists without masks, where a kernel
        tells the logarithms of its sums.
        """
        if need.double_backward:
            raise Unsupported(
                "torch's fused attention kernels have no second derivative; use attention 'eager'"
            )
        masked = need.has_bias or need.has_mask
        if self.method == "split" and masked:
            raise Unsupported(
                "method = 'split' knows no position biases, windows and parted documents; use"
                " 'auto'"
            )
        if self.method == "joint" or masked:
            return None
        kernel, faults = tried(need)
        if self.method == "split" and not kernel:
            raise Unsupported(f"method = 'split' cannot be had ({'; '.join(faults)}); use 'auto'")
        return "; ".join(
            [
                f"parts apart by kernel {kernel}" if kernel else "parts joined under a mask",
                *(f"not {why}" for why in faults),
            ]
        )

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        """One softmax over the union of parts: -> [B, T, H, D]."""
        q = parts[0].q
        if self.method != "joint" and all(
            part.bias is None and part.first_visible is None for part in parts
        ):
            kernel = kernel_for(q.device.type, q.dtype, q.shape[-1])
            if kernel:
                return merged_attention(KERNELS[kernel], parts)
        return self.joint(parts)

    def joint(self, parts: Sequence[KVBlock]) -> Tensor:
        """All parts in one call under one mask."""
        width = parts[0].v.shape[-1]
        square = (
            len(parts) == 1
            and parts[0].causal
            and parts[0].bias is None
            and parts[0].first_visible is None
        )
        q, k, v, mask = concatenate_blocks(parts)
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if square else mask,
            is_causal=square,  # top-left aligned, which is right only for a square
            scale=width**-0.5,
        )
        return out.transpose(1, 2)[..., :width]


@assume_constant_result
def kernel_for(device: str, dtype: torch.dtype, d_head: int) -> str:
    """Which kernel runs parts one by one."""
    return kernel_name(device, dtype, d_head)


@hookimpl
def lswt_components() -> list[type]:
    """Offer torch's attention."""
    return [Sdpa]
