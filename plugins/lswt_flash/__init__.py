"""Attention by the flash-attn package (versions 2, 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Dims,
    KVBlock,
    SoftCap,
    Unsupported,
)
from lswt_core.plugin_api.attention import assume_constant_result, refuse_other_parts
from lswt_core.plugin_api.attention_merge import merged_attention, soft_cap_of
from lswt_flash.versions import Choice, kernel_of, newest_verified

WIDTH_MULTIPLE = 8  # of head widths


class Flash(AttentionBackend):
    """FlashAttention (Dao 2023, arXiv 2307.08691; Shah et al. 2024, arXiv 2407.08608) by its
    authors' package.

    Runs one kernel per key/value block and merges the outputs by their logsumexps, so the KV cache
    is neither copied nor masked. Uses the newest installed version that passes a small test on the
    device. Keys and values that need no gradient get none, if Triton's kernel passes it too. Of
    transforms of the scores it has SoftCap. ``deterministic`` makes the backward pass
    bitwise repeatable, at some cost.
    """

    name = "flash"
    libraries = ("flash_attn", "flash_attn_interface")
    citation = """@article{dao2023flashattention2,
  title={FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning},
  author={Dao, Tri}, journal={arXiv preprint arXiv:2307.08691}, year={2023}}
@article{shah2024flashattention3,
  title={FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision},
  author={Shah, Jay and others}, journal={arXiv preprint arXiv:2407.08608}, year={2024}}"""

    def __init__(self, dims: Dims, *, deterministic: bool = False) -> None:
        super().__init__(dims)
        self.deterministic = deterministic

    def require(self, need: AttentionRequirements) -> str:
        """Refuse all but CUDA and half precision, masks, biases, transforms of scores other than
        SoftCap, and second derivatives; returns which version runs.
        """
        for applies, reason in unsupported_reasons(need):
            if applies:
                raise Unsupported(reason)
        choice, failures = newest_verified(need, self.deterministic)
        notes = [f"flash-attn {choice}", *(f"not {failure}" for failure in failures)]
        return "; ".join(notes)

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        """One softmax over the keys of all blocks: -> [B, T, H, D]. Raises Unsupported for masks
        that `require` was not asked about, as for prompts of different lengths in one batch.
        """
        refuse_other_parts(self.name, blocks, {"transform"})
        q, soft_cap = blocks[0].q, soft_cap_of(blocks)
        choice = choice_for(
            q.device.type,
            q.dtype,
            q.shape[-1],
            q.shape[2] // blocks[0].k.shape[2],
            soft_cap > 0,
            self.deterministic,
        )
        return merged_attention(kernel_of(choice, self.deterministic, soft_cap), blocks)


def unsupported_reasons(need: AttentionRequirements) -> list[tuple[bool, str]]:
    """Whether each reason to refuse applies, and the reason."""
    return [
        (need.device != "cuda", f"it runs on CUDA devices, not on {need.device}"),
        (
            need.dtype not in (torch.float16, torch.bfloat16),
            f"it computes in float16 and bfloat16, not in {need.dtype}; set train.precision ="
            " 'bfloat16'",
        ),
        (need.d_head > 256, f"its head width is at most 256, the model's is {need.d_head}"),
        (
            need.d_head % WIDTH_MULTIPLE != 0,
            f"its head widths are multiples of {WIDTH_MULTIPLE}, the model's is {need.d_head}",
        ),
        (need.has_bias, "it supports no attention bias that leaves sinks and the KV cache alone"),
        (
            need.has_mask,
            "it cannot hide keys outside of a document or a window; set train.document_masking ="
            " false, and use no memory with a window",
        ),
        (need.has_selection, "it cannot hide keys per query; use attention 'sdpa'"),
        (
            need.transform not in (None, SoftCap),
            "it transforms scores by SoftCap alone; use attention 'flex' or 'eager'",
        ),
        (need.double_backward, "it has no second derivative"),
    ]


@assume_constant_result
def choice_for(
    device: str,
    dtype: torch.dtype,
    d_head: int,
    queries_per_kv: int,
    capped: bool,
    deterministic: bool,
) -> Choice:
    """The version that runs."""
    need = AttentionRequirements(
        device,
        dtype,
        d_head,
        queries_per_kv=queries_per_kv,
        transform=SoftCap if capped else None,
    )
    return newest_verified(need, deterministic)[0]


@hookimpl
def lswt_components() -> list[type]:
    """Offer the flash-attn package."""
    return [Flash]
