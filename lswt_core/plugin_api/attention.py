"""For attention backends: the scores of a key block, the softmax over all blocks by its definition,
and blocks concatenated for a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from lswt_core.interfaces import KVBlock, ScoreTransform, Unsupported

# What a block may carry besides queries, keys and values: its name, and a backend that takes it.
BLOCK_PARTS = {
    "bias": ("attention biases", "sdpa"),
    "first_visible": ("keys hidden by padding, documents or a window", "sdpa"),
    "selected": ("keys selected per query", "sdpa"),
    "transform": ("this transform of the scores", "eager"),
}


class ConcatenatedBlocks(NamedTuple):
    """All key blocks as one; D' is D times the number of distinct query encodings."""

    q: Tensor  # [B, T, H, D']
    k: Tensor  # [B, N, G, D']
    v: Tensor  # [B, N, G, D'], zeros beyond D
    # broadcasts to [B, H, T, N]: bool (True = visible), or a bias to add to the scores; None: no
    # key is masked or biased
    mask: Tensor | None


def distinct_queries(blocks: Sequence[KVBlock]) -> tuple[list[Tensor], list[int]]:
    """Return the distinct query tensors of some blocks, and for each block the index of its own."""
    queries: list[Tensor] = []
    query_index: list[int] = []
    for block in blocks:
        if not any(block.q is query for query in queries):
            queries.append(block.q)
        query_index.append(next(i for i, query in enumerate(queries) if query is block.q))
    return queries, query_index


def concatenate_blocks(blocks: Sequence[KVBlock]) -> ConcatenatedBlocks:
    """Concatenate blocks along the keys, the causal one last.

    Blocks whose queries are encoded differently (sinks, usually) get a slice of the head width
    each, with queries concatenated and keys zero in the other slices: q . k is unchanged and any
    kernel can run it, at the price of a wider head. Pass 1/sqrt(D) of the original width as the
    kernel's scale, and drop the output beyond D. Raises Unsupported for transforms of the scores,
    for which a mask has no place.
    """
    refuse_other_parts("by one mask", blocks, {"bias", "first_visible", "selected"})
    blocks = sorted(blocks, key=lambda block: block.causal)
    queries, query_index = distinct_queries(blocks)
    d_head = blocks[0].q.shape[-1]
    padding = (len(queries) - 1) * d_head
    keys, values = [], []
    for block, index in zip(blocks, query_index, strict=True):
        offset = index * d_head
        keys.append(pad(block.k, (offset, padding - offset)) if padding else block.k)
        values.append(pad(block.v, (0, padding)) if padding else block.v)
    q, k, v = torch.cat(queries, -1), torch.cat(keys, 1), torch.cat(values, 1)
    return ConcatenatedBlocks(q, k, v, concatenate_masks(blocks))


AnyFunction = TypeVar("AnyFunction", bound=Callable[..., object])


def assume_constant_result(function: AnyFunction) -> AnyFunction:
    """``torch.compiler.assume_constant_result`` without importing the compiler (2 s): a compiled
    model calls the function once, while it is traced, and keeps the result.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def softmax_scale(q: Tensor) -> float:
    """1 / sqrt(D) of queries [..., D]."""
    return float(q.shape[-1] ** -0.5)


def refuse_other_parts(name: str, blocks: Sequence[KVBlock], supported: Collection[str]) -> None:
    """Raise Unsupported if a block carries one of BLOCK_PARTS that the backend called ``name`` does
    not support. For what `require` was not asked about: a backend must not ignore it.
    """
    for part, (description, other) in BLOCK_PARTS.items():
        if part not in supported and any(getattr(block, part) is not None for block in blocks):
            raise Unsupported(
                f"attention {name!r} does not support {description}: use attention {other!r}"
            )


def common_transform(blocks: Sequence[KVBlock]) -> ScoreTransform | None:
    """The transform of the scores that all blocks share. Raises Unsupported if they differ."""
    transform = blocks[0].transform
    if any(block.transform is not transform for block in blocks):
        raise Unsupported(
            "one kernel cannot transform the scores of some blocks and not of others: use attention"
            " 'eager'"
        )
    return transform


def grouped_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of every query head's a [B, H, T, X] and its key/value head's b [B, G, X, Y],
    [B, H, T, Y]. Query heads of a group are rows of one product: b is not repeated in memory.
    """
    heads, rows = a.shape[1:3]
    groups = b.shape[1]
    if heads == groups:
        return a @ b
    product = a.unflatten(1, (groups, -1)).flatten(2, 3) @ b  # [B, G, H/G * T, Y]
    return product.unflatten(2, (-1, rows)).flatten(1, 2)


def attention_scores(block: KVBlock) -> Tensor:
    """Scaled, transformed, biased and masked scores of one block, [B, H, T, N], in float32 or
    wider.
    """
    q, k = block.q.transpose(1, 2), block.k.transpose(1, 2)
    product = grouped_matmul(q, k.mT)
    scores = product.to(torch.promote_types(q.dtype, torch.float32)) * softmax_scale(q)
    if block.transform is not None:
        scores = block.transform(scores)
    if block.bias is not None:
        scores = scores + block.bias.dense()
    visible = block.visible()
    return scores if visible is None else scores.masked_fill(~visible, -torch.inf)


def reference_attention(blocks: Sequence[KVBlock]) -> Tensor:
    """One softmax over all blocks, [B, T, H, D], by its definition: all scores are in memory at
    once; keys and values are not copied.
    """
    scores = torch.cat([attention_scores(block) for block in blocks], -1)  # [B, H, T, sum of N]
    weights = scores.softmax(-1).to(blocks[0].v.dtype)
    splits = weights.split([block.k.shape[1] for block in blocks], dim=-1)
    outputs = [
        grouped_matmul(w, block.v.transpose(1, 2)) for w, block in zip(splits, blocks, strict=True)
    ]
    return torch.stack(outputs).sum(0).transpose(1, 2)


def concatenate_masks(blocks: Sequence[KVBlock]) -> Tensor | None:
    """One mask for concatenated blocks: bool if no block is biased, else a bias to add; None if
    nothing is masked or biased.
    """
    has_bias = any(block.bias is not None for block in blocks)
    visible = [block.visible() for block in blocks]
    if not has_bias and all(mask is None for mask in visible):
        return None
    masks = []
    for block, mask in zip(blocks, visible, strict=True):
        if mask is None:
            mask = torch.ones(mask_shape(block), dtype=torch.bool, device=block.q.device)
        mask = additive_mask(block, mask) if has_bias else mask
        masks.append(mask.expand(torch.broadcast_shapes(mask.shape, mask_shape(block))))
    shape = torch.broadcast_shapes(*(mask.shape[:2] for mask in masks))
    return torch.cat([mask.expand(*shape, *mask.shape[-2:]) for mask in masks], dim=-1)


def mask_shape(block: KVBlock) -> tuple[int, int, int, int]:
    """[1, 1, T, N] of a block."""
    return 1, 1, block.q.shape[1], block.k.shape[1]


def additive_mask(block: KVBlock, visible: Tensor) -> Tensor:
    """A block's bias, -inf where ``visible`` (broadcasts to [B, H, T, N]) is False."""
    dtype, device = block.q.dtype, block.q.device
    if block.bias is None:
        bias = torch.zeros(mask_shape(block), dtype=dtype, device=device)
    else:
        bias = block.bias.dense().to(dtype)
    return bias.masked_fill(~visible, -torch.inf)
