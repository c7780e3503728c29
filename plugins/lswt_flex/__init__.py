"""Attention by torch's FlexAttention: any bias and any hidden keys, in one kernel that holds no
mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Dims,
    KVBlock,
    SlopeBias,
    Unsupported,
)
from lswt_core.plugin_api.attention import concatenate_blocks

Index = Tensor  # [] int, as the kernel hands them to its callbacks


class Flex(AttentionBackend):
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496): parts side by side, their visibility and
    biases as callbacks.

    On CUDA the kernel is compiled. On the CPU it has no backward pass, so there it serves
    evaluation alone and training refuses it.
    """

    name = "flex"
    citation = """@article{dong2024flex,
  title={Flex Attention: A Programming Model for Generating Optimized Attention Kernels},
  author={Dong, Juechu and Feng, Boyuan and Guessous, Driss and Liang, Yanbo and He, Horace},
  journal={arXiv preprint arXiv:2412.05496}, year={2024}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)

    def require(self, need: AttentionRequirements) -> None:
        """A GPU, and one derivative."""
        if need.device != "cuda":
            raise Unsupported(
                f"FlexAttention has no backward pass on {need.device}, only on CUDA devices; use"
                " 'sdpa' or 'eager'"
            )
        if need.double_backward:
            raise Unsupported("FlexAttention has no second derivative; use attention 'eager'")

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        """One softmax over the union of parts: -> [B, T, H, D]."""
        parts = sorted(parts, key=lambda part: part.causal)  # as `join` has them
        # needs no mask
        q, k, v, _ = concatenate_blocks(
            [part._replace(causal=False, bias=None, first_visible=None) for part in parts]
        )
        width = parts[0].v.shape[-1]
        heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        kernel: Any = compiled() if q.is_cuda else flex_attention
        out = kernel(
            *heads_first, score_mod=biases(parts), block_mask=visibility(parts), scale=width**-0.5
        )
        return out.transpose(1, 2)[..., :width]


@cache
def compiled() -> Callable[..., Any]:
    """The fused kernel."""
    return torch.compile(flex_attention, dynamic=False)


def visibility(parts: Sequence[KVBlock]) -> Any:
    """Which keys each query sees, by blocks."""
    q, first = parts[0].q, sum(part.k.shape[1] for part in parts if not part.causal)
    keys, first_visible = (
        sum(part.k.shape[1] for part in parts),
        next((part.first_visible for part in parts if part.first_visible is not None), None),
    )
    places = [
        (
            q.new_full((part.k.shape[1],), 1 << 60, dtype=torch.int64)
            if part.positions is None
            else part.positions
        )
        for part in parts
    ]
    positions = torch.cat(places)  # [sum of N]; sinks stand after every start

    def visible(row: Index, head: Index, query: Index, key: Index) -> Tensor:
        seen = key - first <= query
        return (
            seen
            if first_visible is None
            else seen & (positions[key] >= first_visible[row if parted else 0, query])
        )

    parted = first_visible is not None and first_visible.shape[0] > 1
    rows = q.shape[0] if parted else None
    return create_block_mask(visible, rows, None, q.shape[1], keys, device=str(q.device))


def biases(parts: Sequence[KVBlock]) -> Callable[..., Tensor] | None:
    """What is added to each score; None: nothing."""
    columns, first = [], 0
    for part in parts:
        if part.bias is not None:
            columns.append((first, part.k.shape[1], added_by(part.bias)))
        first += part.k.shape[1]
    if not columns:
        return None

    def score(value: Tensor, row: Index, head: Index, query: Index, key: Index) -> Tensor:
        for first, size, added in columns:
            own = (key >= first) & (key < first + size)
            value = torch.where(
                own,
                value + added(row, head, query, (key - first).clamp(0, size - 1)).to(value.dtype),
                value,
            )
        return value

    return score


def added_by(bias: Any) -> Callable[[Index, Index, Index, Index], Tensor]:
    """A bias as a function of row, head, query and key of its part; slopes stay slopes."""
    if isinstance(bias, SlopeBias):
        return lambda row, head, query, key: (
            -bias.slopes[head] * (bias.q_positions[query] - bias.k_positions[key])
        )
    dense = bias.dense()
    dense = dense.expand(*(1,) * (4 - dense.ndim), *dense.shape)  # [B or 1, H or 1, T, N]
    rows, heads = (int(size > 1) for size in dense.shape[:2])
    return lambda row, head, query, key: dense[row * rows, head * heads, query, key]


@hookimpl
def lswt_components() -> list[type]:
    """Offer FlexAttention."""
    return [Flex]
