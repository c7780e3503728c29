"""Attention by the flash-attn package (versions 2, 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, AttentionRequirements, Dims, KVBlock, Unsupported
from lswt_core.plugin_api.attention import assume_constant_result
from lswt_core.plugin_api.attention_merge import merged_attention
from lswt_flash.generations import GENERATIONS, newest_sound

WIDTHS = 8  # head widths are multiples of it


class Flash(AttentionBackend):
    """FlashAttention (Dao 2023, arXiv 2307.08691; Shah et al. 2024, arXiv 2407.08608) by its
    authors' package.

    Parts are computed one by one and merged by the logarithms of their sums: what is remembered is
    neither copied nor masked. Of the generations that are installed the newest serves that gives,
    in a small trial on the device, what it should. ``deterministic`` makes the backward pass
    repeatable, at some cost.
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
        """The package needs an NVIDIA GPU and half precision, and offers no masks, biases or second
        derivatives.
        """
        reasons = {
            f"it runs on CUDA devices, not on {need.device}": need.device != "cuda",
            f"it computes in float16 and bfloat16, not in {need.dtype}; set train.precision = 'bfloat16'": (
                need.dtype not in (torch.float16, torch.bfloat16)
            ),
            f"its head width ends at 256, but {need.d_head} is needed": need.d_head > 256,
            f"its head widths are multiples of {WIDTHS}, and {need.d_head} is not": (
                need.d_head % WIDTHS != 0
            ),
            "it has no bias that would leave sinks and remembered keys alone": need.has_bias,
            "it cannot hide keys beyond a document or a window; set train.document_masking = false, and no memory with a window": (
                need.has_mask
            ),
            "it has no second derivative": need.double_backward,
        }
        for reason, applies in reasons.items():
            if applies:
                raise Unsupported(reason)
        generation, faults = newest_sound(need, self.deterministic)
        return "; ".join(
            [f"flash-attn version {generation}", *(f"not {fault}" for fault in faults)]
        )

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        """One softmax over the union of parts: -> [B, T, H, D]. Raises Unsupported for what
        `require` was not told of, as prompts of different length in one batch.
        """
        if any(part.first_visible is not None or part.bias is not None for part in parts):
            raise Unsupported(
                "flash-attn can neither hide keys (of padding, a document, a window) nor add"
                " biases: use attention 'sdpa'"
            )
        q = parts[0].q
        return merged_attention(
            GENERATIONS[
                generation_for(q.device.type, q.dtype, q.shape[-1], self.deterministic),
                self.deterministic,
            ],
            parts,
        )


@assume_constant_result
def generation_for(device: str, dtype: torch.dtype, d_head: int, deterministic: bool) -> int:
    """Which generation serves."""
    return newest_sound(AttentionRequirements(device, dtype, d_head), deterministic)[0]


@hookimpl
def lswt_components() -> list[type]:
    """Offer the flash-attn package."""
    return [Flash]
