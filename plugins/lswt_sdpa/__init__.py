"""Attention by torch's fused scaled-dot-product kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, AttentionRequirements, Dims, KVBlock, Unsupported
from lswt_core.plugin_api.attention import (
    assume_constant_result,
    concatenate_blocks,
    refuse_other_parts,
)
from lswt_core.plugin_api.attention_merge import merged_attention
from lswt_sdpa.kernels import join_query_groups, split_query_groups
from lswt_sdpa.selection import KERNELS, kernel_name, select_kernel


class Sdpa(AttentionBackend):
    """torch's fused attention (Dao et al. 2022, arXiv 2205.14135), one call per key/value block or
    one call for all.

    ``method`` "split" runs every block with an unmasked or a square causal kernel and merges the
    outputs by their logsumexps: no mask, no copy of the KV cache. On CUDA the kernel is the first
    of cuDNN's (on Hopper and newer), flash and memory-efficient attention that passes a small test
    on the device, or ``kernel`` alone; on a CPU it is torch's flash kernel. "joint" concatenates
    the blocks under one mask and works everywhere. "auto" splits if a kernel is available and no
    block has a bias or hidden keys, else joins. Grouped key/value heads are never repeated in
    memory: what has no kernel for them is called once for every query head of a group. Split on
    CUDA, keys and values that need no gradient get none, if Triton's kernel passes that test.
    """

    name = "sdpa"
    citation = """@inproceedings{dao2022flashattention,
  title={FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness},
  author={Dao, Tri and Fu, Daniel Y. and Ermon, Stefano and Rudra, Atri and R{\\'e}, Christopher},
  booktitle={NeurIPS}, year={2022}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        method: Literal["auto", "split", "joint"] = "auto",
        kernel: Literal["auto", "cudnn", "flash", "memory-efficient"] = "auto",
    ) -> None:
        super().__init__(dims)
        if method == "joint" and kernel != "auto":
            raise Unsupported(f"kernel = {kernel!r} runs block by block: not with method = 'joint'")
        # who names a kernel wants it to run
        self.method = "split" if kernel != "auto" else method
        self.kernel = kernel

    def require(self, need: AttentionRequirements) -> str | None:
        """Refuse second derivatives, transforms of scores, and "split" for masks, biases and
        devices without a kernel; returns which kernel runs.
        """
        if need.has_transform:
            raise Unsupported(
                "torch's fused attention kernels transform no scores; use 'flex' or 'eager'"
            )
        if need.double_backward:
            raise Unsupported(
                "torch's fused attention kernels have no second derivative; use attention 'eager'"
            )
        masked = need.has_bias or need.has_mask or need.has_selection
        if self.method == "split" and masked:
            raise Unsupported(
                f"{self.asked} supports no attention biases, windows, document masking or"
                " selection of keys; use 'auto'"
            )
        if self.method == "joint" or masked:
            return None
        kernel, failures = select_kernel(need, self.kernel)
        if self.method == "split" and not kernel:
            raise Unsupported(f"{self.asked} is not available ({'; '.join(failures)}); use 'auto'")
        choice = "one call under a mask"
        if kernel:
            choice = f"one call per block by kernel {kernel}"
        return "; ".join([choice, *(f"not {failure}" for failure in failures)])

    @property
    def asked(self) -> str:
        """The option that asks for a kernel."""
        return "method = 'split'" if self.kernel == "auto" else f"kernel = {self.kernel!r}"

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        """One softmax over the keys of all blocks: -> [B, T, H, D]. Raises Unsupported for
        transforms of scores.
        """
        refuse_other_parts(self.name, blocks, {"bias", "first_visible", "selected"})
        q = blocks[0].q
        if self.method != "joint" and not any(map(is_masked, blocks)):
            queries_per_kv = q.shape[2] // blocks[0].k.shape[2]
            kernel = kernel_for(q.device.type, q.dtype, q.shape[-1], queries_per_kv, self.kernel)
            if kernel:
                return merged_attention(KERNELS[kernel], blocks)
        return self.joint(blocks)

    def joint(self, blocks: Sequence[KVBlock]) -> Tensor:
        """All blocks in one call under one mask."""
        width = blocks[0].v.shape[-1]
        square = len(blocks) == 1 and blocks[0].causal and not is_masked(blocks[0])
        q, k, v, mask = concatenate_blocks(blocks)
        out = attend_joint(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            None if square else mask,
            is_causal=square,  # torch aligns it top left, which is right only for a square
            scale=width**-0.5,
        )
        return out.transpose(1, 2)[..., :width]


def is_masked(block: KVBlock) -> bool:
    """Whether a block needs a mask besides the causal one."""
    return not (block.bias is block.first_visible is block.selected is None)


def attend_joint(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool, scale: float
) -> Tensor:
    """The attention of torch of q [B, H, T, D] to k and v [B, G, N, D] under a mask, [B, H, T, D].

    Of grouped heads, torch repeats keys and values in memory where no kernel takes them together
    with the mask: everywhere but on the CPU, and there if the mask takes a gradient.
    """
    heads, groups = q.shape[1], k.shape[1]
    if heads == groups or (
        q.device.type == "cpu" and not (mask is not None and mask.requires_grad)
    ):
        return scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=heads != groups
        )
    queries = split_query_groups(q, groups, 1)
    masks: Sequence[Tensor | None] = [mask] * len(queries)
    if mask is not None and mask.shape[1] > 1:
        masks = split_query_groups(mask, groups, 1)
    outputs = [
        scaled_dot_product_attention(part, k, v, own_mask, is_causal=is_causal, scale=scale)
        for part, own_mask in zip(queries, masks, strict=True)
    ]
    return join_query_groups(outputs, 1)


@assume_constant_result
def kernel_for(
    device: str, dtype: torch.dtype, d_head: int, queries_per_kv: int, wanted: str
) -> str:
    """The kernel that runs blocks one by one; "": none."""
    return kernel_name(device, dtype, d_head, queries_per_kv, wanted)


@hookimpl
def lswt_components() -> list[type]:
    """Offer torch's attention."""
    return [Sdpa]
