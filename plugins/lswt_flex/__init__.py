"""Attention by torch's FlexAttention: any bias and any mask in one kernel, without a dense mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Bias,
    DifferenceBias,
    Dims,
    KVBlock,
    SlopeBias,
    Unsupported,
)
from lswt_core.plugin_api.attention import (
    common_transform,
    concatenate_blocks,
    concatenate_masks,
)
from lswt_core.plugin_api.compilation import raise_recompile_limit

Index = Tensor  # [] int, as the kernel passes them to its callbacks
SINK_POSITION = 1 << 60  # no query hides a sink: it is above every ``first_visible``


class Flex(AttentionBackend):
    """FlexAttention (Dong et al. 2024, arXiv 2412.05496): blocks are concatenated; masks, biases
    and transforms of scores are callbacks.

    On CUDA the kernel is compiled. On the CPU it has no backward pass: it serves evaluation alone,
    and training refuses it.
    """

    name = "flex"
    citation = """@article{dong2024flex,
  title={Flex Attention: A Programming Model for Generating Optimized Attention Kernels},
  author={Dong, Juechu and Feng, Boyuan and Guessous, Driss and Liang, Yanbo and He, Horace},
  journal={arXiv preprint arXiv:2412.05496}, year={2024}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)

    def require(self, need: AttentionRequirements) -> None:
        """Refuse devices other than CUDA, and second derivatives."""
        if need.device != "cuda":
            raise Unsupported(
                f"FlexAttention has no backward pass on {need.device}, only on CUDA devices; use"
                " 'sdpa' or 'eager'"
            )
        if need.double_backward:
            raise Unsupported("FlexAttention has no second derivative; use attention 'eager'")

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        """One softmax over the keys of all blocks: -> [B, T, H, D]."""
        blocks = sorted(blocks, key=lambda block: block.causal)  # the order of `join`
        plain = [KVBlock(block.q, block.k, block.v, causal=False) for block in blocks]
        q, k, v, _ = concatenate_blocks(plain)
        width = blocks[0].v.shape[-1]
        kernel: Any = compiled_kernel() if q.is_cuda else flex_attention
        out = kernel(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            score_mod=score_mod_of(blocks),
            block_mask=block_mask_of(blocks),
            scale=width**-0.5,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2)[..., :width]


@cache
def compiled_kernel() -> Callable[..., Any]:
    """The fused kernel."""
    return torch.compile(flex_attention, dynamic=False, **raise_recompile_limit())


def block_mask_of(blocks: Sequence[KVBlock]) -> Any:
    """The attention mask as FlexAttention's BlockMask; the causal block is the last."""
    q = blocks[0].q
    n_keys = sum(block.k.shape[1] for block in blocks)
    n_old = sum(block.k.shape[1] for block in blocks if not block.causal)
    first_visible = next(
        (block.first_visible for block in blocks if block.first_visible is not None), None
    )
    positions = torch.cat([positions_or_sinks(block) for block in blocks])  # [n_keys]
    per_row = first_visible is not None and first_visible.shape[0] > 1
    selected = selected_keys(blocks)
    selection = None if selected is None else dense_callback(selected)

    def mask_mod(row: Index, head: Index, query: Index, key: Index) -> Tensor:
        visible = key - n_old <= query
        if first_visible is not None:
            # apart, because torch 2.10 maps over no index [0, query] of a number and a tensor
            of_row = first_visible[row] if per_row else first_visible[0]
            first = of_row[query]
            visible = visible & (positions[key] >= first)
        return visible if selection is None else visible & selection(row, head, query, key)

    if first_visible is None and selected is None and not torch.compiler.is_compiling():
        return causal_block_mask(q.shape[1], n_keys, n_old, str(q.device))
    rows, heads = (1, 1) if selected is None else selected.shape[:2]
    return create_block_mask(
        mask_mod,
        q.shape[0] if per_row or rows > 1 else None,
        q.shape[2] if heads > 1 else None,
        q.shape[1],
        n_keys,
        device=str(q.device),
    )


@lru_cache(maxsize=64)
def causal_block_mask(n_queries: int, n_keys: int, n_old: int, device: str) -> Any:
    """The mask of queries that see all of ``n_old`` keys and, causally, their own: the same in
    every layer and step. Making it evaluates every pair of a query and a key.
    """

    def mask_mod(row: Index, head: Index, query: Index, key: Index) -> Tensor:
        return key - n_old <= query

    with torch.inference_mode(False):  # wherever it is first asked for
        return create_block_mask(mask_mod, None, None, n_queries, n_keys, device=device)


def selected_keys(blocks: Sequence[KVBlock]) -> Tensor | None:
    """Which keys of all blocks are selected, [B or 1, H or 1, T, n_keys]; None: all are."""
    return concatenate_masks(
        [
            KVBlock(block.q, block.k, block.v, causal=False, selected=block.selected)
            for block in blocks
        ]
    )


def dense_callback(values: Tensor) -> Callable[[Index, Index, Index, Index], Tensor]:
    """A tensor that broadcasts to [B, H, T, N] as a function of row, head, query and key."""
    values = values.expand(*(1,) * (4 - values.ndim), *values.shape)
    of_row, of_head, of_query, of_key = (int(size > 1) for size in values.shape)
    return lambda row, head, query, key: values[
        row * of_row, head * of_head, query * of_query, key * of_key
    ]


def positions_or_sinks(block: KVBlock) -> Tensor:
    """The positions of a block's keys, [N]; SINK_POSITION for sinks."""
    if block.positions is not None:
        return block.positions
    return block.q.new_full((block.k.shape[1],), SINK_POSITION, dtype=torch.int64)


def score_mod_of(blocks: Sequence[KVBlock]) -> Callable[..., Tensor] | None:
    """The transform and the biases of all blocks as one callback on scores; None: neither."""
    transform = common_transform(blocks)
    columns: list[tuple[int, int, Callable[..., Tensor]]] = []  # first key, number of keys, bias
    start = 0
    for block in blocks:
        size = block.k.shape[1]
        if block.bias is not None:
            columns.append((start, size, bias_function(block.bias)))
        start += size
    if not columns and transform is None:
        return None

    def score_mod(score: Tensor, row: Index, head: Index, query: Index, key: Index) -> Tensor:
        if transform is not None:
            score = transform(score)
        for start, size, bias in columns:
            inside = (key >= start) & (key < start + size)
            added = bias(row, head, query, (key - start).clamp(0, size - 1))
            score = torch.where(inside, score + added.to(score.dtype), score)
        return score

    return score_mod


def bias_function(bias: Bias) -> Callable[[Index, Index, Index, Index], Tensor]:
    """A bias as a function of row, head, query and key of its block; slopes and differences stay
    what they are.
    """
    if isinstance(bias, SlopeBias):
        slopes, q_positions, k_positions = bias.slopes, bias.q_positions, bias.k_positions
        return lambda row, head, query, key: -slopes[head] * (q_positions[query] - k_positions[key])
    if isinstance(bias, DifferenceBias):
        q_terms, k_terms = bias.q_terms, bias.k_terms
        return lambda row, head, query, key: q_terms[row, head, query] - k_terms[row, head, key]
    return dense_callback(bias.dense())


@hookimpl
def lswt_components() -> list[type]:
    """Offer FlexAttention."""
    return [Flex]
