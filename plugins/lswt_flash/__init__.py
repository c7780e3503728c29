"""Attention by the flash-attn package (versions 2, 3 and 4)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, Dims, Need, Part, Unsupported
from lswt_core.parts import join

# newest first: module, generation
HOMES = (("flash_attn.cute", 4), ("flash_attn_interface", 3), ("flash_attn", 2))


class Flash(AttentionBackend):
    """FlashAttention (Dao 2023, arXiv 2307.08691; Shah et al. 2024, arXiv 2407.08608) by its authors' package.

    Parts are joined into one call; the package aligns its causal mask to the bottom right, which is what remembered keys
    before a causal square need. ``deterministic`` makes the backward pass repeatable, at some cost.
    """

    name = "flash"
    citation = """@article{dao2023flashattention2,
  title={FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning},
  author={Dao, Tri}, journal={arXiv preprint arXiv:2307.08691}, year={2023}}
@article{shah2024flashattention3,
  title={FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision},
  author={Shah, Jay and others}, journal={arXiv preprint arXiv:2407.08608}, year={2024}}"""

    def __init__(self, dims: Dims, *, deterministic: bool = False) -> None:
        super().__init__(dims)
        self.deterministic = deterministic
        self.function: Callable[..., Any] | None = None

    def require(self, need: Need) -> None:
        """The package needs an NVIDIA GPU and half precision, and offers no masks, biases or second derivatives."""
        width = need.d_head * (1 + need.sinks)
        reasons = {
            f"it runs on CUDA devices, not on {need.device}": need.device != "cuda",
            f"it computes in float16 and bfloat16, not in {need.dtype}; set train.precision = 'bfloat16'": need.dtype
            not in (torch.float16, torch.bfloat16),
            f"its head width ends at 256, but {width} is needed": width > 256,
            "it has no bias that would leave sinks and remembered keys alone": need.biased,
            "it cannot hide keys beyond a document or a window; set train.documents = 'carry', and no memory with a window": need.bounded,
            "it has no second derivative": need.twice,
        }
        for reason, applies in reasons.items():
            if applies:
                raise Unsupported(reason)
        self.function = find_function()

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """One softmax over the union of parts: -> [B, T, H, D]."""
        function = self.function or find_function()
        width = parts[0].v.shape[-1]
        q, k, v, _ = join(parts)  # the one hidden triangle is the last part's, which causal=True hides
        out = function(q, k, v, softmax_scale=width**-0.5, causal=parts[-1].causal, deterministic=self.deterministic)
        return (out[0] if isinstance(out, tuple) else out)[..., :width]  # version 4 always returns (out, lse)


def find_function() -> Callable[..., Any]:
    """flash_attn_func of the newest version installed; Unsupported, with every cause, if none can be imported."""
    causes = []
    for module, generation in HOMES:
        try:
            return importlib.import_module(module).flash_attn_func
        except (ImportError, OSError, AttributeError) as error:  # a build for another torch fails with OSError
            causes.append(f"version {generation}: {error}")
    raise Unsupported("the flash-attn package cannot be imported (pip install --no-build-isolation flash-attn): " + "; ".join(causes))


@hookimpl
def lswt_components() -> list[type]:
    """Offer the flash-attn package."""
    return [Flash]
