"""Attention on a CPU by matrix products, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, Dims, Need, Part, Unsupported
from lswt_core.parts import scale_of, whole

FEW = 4  # queries for which blocks are not worth their preparation
BLOCK = 1 << 23  # scores that exist at once: they stay in a CPU's shared cache
KEPT = 1 << 25  # bytes of softmax weights that a layer keeps for its backward pass; where there are more, they are computed anew
ROWS = 256  # queries of a block: more of them waste products on keys that lie ahead, fewer make poor ones


class Blocked(AttentionBackend):
    """Exact attention whose scores exist for a block of queries at a time, and are computed anew in the backward pass if they are many.

    The idea of memory-efficient attention (Rabe and Staats 2021, arXiv 2112.05682) in the form that suits a CPU: its matrix products
    are several times as fast as torch's fused attention kernel, and the softmax between them stays in the cache. Keys behind the
    causal triangle's blocks are skipped, and keys and values that take no gradient, as remembered ones, cost none. Scores are rounded
    to the compute precision, softmax is taken in float32 at least.
    """

    name = "blocked"
    citation = """@article{rabe2021selfattention,
  title={Self-attention Does Not Need O(n^2) Memory},
  author={Rabe, Markus N and Staats, Charles},
  journal={arXiv preprint arXiv:2112.05682}, year={2021}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)

    def require(self, need: Need) -> None:
        """CPUs only; neither biases nor second derivatives."""
        if need.device != "cpu":
            raise Unsupported(f"blocked attention is made for CPUs, the device is {need.device}; use 'auto'")
        if need.biased:
            raise Unsupported("blocked attention adds no position biases; use 'sdpa' or 'eager'")
        if need.twice:
            raise Unsupported("blocked attention has no second derivative; use attention 'eager'")

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """One softmax over the union of parts: -> [B, T, H, D]."""
        assert all(part.bias is None for part in parts), "refused by `require`"
        if parts[0].q.shape[1] <= FEW:
            return whole(parts)  # keys and values are left where they lie
        parts = sorted(parts, key=lambda part: part.causal)  # the triangle last
        heads = parts[0].q.shape[2]
        tensors = [heads_first(tensor) for part in parts for tensor in (part.q, part.k, part.v)]
        out = BlockedAttend.apply(PartLayout.of(parts), *tensors)
        return out.unflatten(0, (-1, heads)).transpose(1, 2)


class PartLayout(NamedTuple):
    """How parts lie side by side in a block's scores."""

    columns: tuple[slice, ...]  # of every part
    common: tuple[bool, ...]  # whether a part is met by the last one's queries; only a sink brings its own
    causal: bool  # whether the last part is the new segment's triangle
    seen: tuple[Tensor | None, ...]  # of every part: bool [B or 1, T, N], what documents and windows leave to see

    @classmethod
    def of(cls, parts: Sequence[Part]) -> PartLayout:
        """The layout of parts, the triangle last."""
        ends = list(accumulate(part.k.shape[1] for part in parts))
        return cls(
            tuple(slice(end - part.k.shape[1], end) for end, part in zip(ends, parts, strict=True)),
            tuple(part.q is parts[-1].q for part in parts),
            parts[-1].causal,
            tuple(None if p.starts is None or p.at is None else p.at[None, None, :] >= p.starts[:, :, None] for p in parts),
        )

    def blocks(self, q: Tensor) -> Iterator[QueryBlock]:
        """All blocks of the queries [BH, T, D]; what lies ahead of all of a block's queries is left out."""
        keys, length = self.columns[-1].stop, q.shape[1]
        heads = max(1, BLOCK // keys // min(ROWS, length))
        for first in range(0, len(q), heads):
            for start in range(0, length, ROWS):
                stop = min(start + ROWS, length)
                yield QueryBlock(slice(first, first + heads), slice(start, stop), keys - (length - stop) * self.causal)


class QueryBlock(NamedTuple):
    """Some queries of some heads."""

    heads: slice  # of BH
    rows: slice  # of T
    keys: int  # the first so many of N are seen

    def of(self, tensor: Tensor) -> Tensor:
        """The block's share of queries or of their gradients, [BH, T, D] -> [bh, t, D]."""
        return tensor[self.heads, self.rows]

    def seen(self, tensor: Tensor) -> Tensor:
        """The keys or values it sees, [BH, N, D] -> [bh, n, D]."""
        return tensor[self.heads, : self.keys]

    def within(self, columns: slice) -> slice:
        """What of a part's columns it sees."""
        return slice(columns.start, min(columns.stop, self.keys))


class BlockInputs(NamedTuple):
    """What blocks are computed from; rows of the batch and heads are one dimension, BH."""

    layout: PartLayout
    q: Sequence[Tensor]  # [BH, T, D] of every part, scaled; one tensor where queries are common
    k: Sequence[Tensor]  # [BH, N, D] of every part
    keys: Tensor  # [BH, N, D] of all parts, zero where a sink brings its own queries
    values: Tensor  # [BH, N, D] of all parts

    @classmethod
    def of(cls, layout: PartLayout, tensors: Sequence[Tensor]) -> BlockInputs:
        """From queries, keys and values of every part."""
        q, k, v = tensors[::3], tensors[1::3], tensors[2::3]
        shared = q[-1] * scale_of(q[-1])
        common = [key if same else torch.zeros_like(key) for key, same in zip(k, layout.common, strict=True)]
        scaled = [shared if same else query * scale_of(query) for query, same in zip(q, layout.common, strict=True)]
        return cls(layout, scaled, k, torch.cat(common, 1), torch.cat(list(v), 1))

    def weights(self, block: QueryBlock) -> Tensor:
        """Softmax of a block's scores, [bh, t, n]. Whole products are faster than products of slices, which would be copied: so a
        sink's scores are computed twice, and the second time is right.
        """
        scores = torch.bmm(block.of(self.q[-1]), block.seen(self.keys).mT)
        for part, columns in self.uncommon():
            scores[..., columns] = torch.bmm(block.of(self.q[part]), self.k[part][block.heads].mT)
        self.hide(scores, block)
        return scores.softmax(-1)

    def uncommon(self) -> list[tuple[int, slice]]:
        """Parts that bring their own queries, and their columns."""
        every = zip(self.layout.columns, self.layout.common, strict=True)
        return [(part, columns) for part, (columns, common) in enumerate(every) if not common]

    def hide(self, scores: Tensor, block: QueryBlock) -> None:
        """Take what a query must not see out of a block's scores [bh, t, n]."""
        if self.layout.causal:
            triangle = scores[..., block.rows.start - block.rows.stop :]
            triangle.add_(triangle.new_full(triangle.shape[1:], float("-inf")).triu_(1))  # faster than masked_fill_
        for columns, seen in zip(self.layout.columns, self.layout.seen, strict=True):
            if seen is not None:
                part = scores[..., block.within(columns)]
                hidden = ~seen[:, block.rows, : part.shape[-1]]  # [B or 1, t, n]
                if len(hidden) > 1:
                    hidden = hidden.repeat_interleave(len(self.keys) // len(hidden), dim=0)[block.heads]  # [bh, t, n]
                part.masked_fill_(hidden, float("-inf"))


class BlockedAttend(torch.autograd.Function):
    """Attention over parts, the triangle last; the softmax is kept for the backward pass if it is small, else nothing but the inputs."""

    @staticmethod
    def forward(ctx: Any, layout: PartLayout, *tensors: Tensor) -> Tensor:
        """Queries [BH, T, D], keys and values [BH, N, D] of every part -> [BH, T, D]."""
        given = BlockInputs.of(layout, tensors)
        out = torch.empty_like(tensors[-3])
        size = out.shape[0] * out.shape[1] * layout.columns[-1].stop * out.element_size()
        kept = []
        for block in layout.blocks(out):
            p = given.weights(block)
            out[block.heads, block.rows] = torch.bmm(p, block.seen(given.values))
            if size <= KEPT and any(ctx.needs_input_grad):
                kept.append(p)
        ctx.layout, ctx.inputs = layout, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the queries, and of those keys and values that want one."""
        wide = torch.promote_types(grad.dtype, torch.float32)
        saved = ctx.saved_tensors  # to be asked for once, or activation checkpointing runs the layer once more
        tensors, kept = saved[: ctx.inputs], saved[ctx.inputs :]
        wanted = zip(tensors, ctx.needs_input_grad[1:], strict=True)
        grads = [torch.zeros_like(t, dtype=wide) if want else None for t, want in wanted]
        given = BlockInputs.of(ctx.layout, tensors)
        for i, block in enumerate(ctx.layout.blocks(grad)):
            differentiate(given, block, kept[i] if kept else given.weights(block), grad, grads)
        return (None, *(None if g is None else g.to(grad.dtype) for g in grads))


def differentiate(given: BlockInputs, block: QueryBlock, p: Tensor, grad: Tensor, grads: Sequence[Tensor | None]) -> None:
    """Add what a block with weights p [bh, t, n] contributes to the gradients of queries, keys and values of every part."""
    grad = block.of(grad)  # [bh, t, D]
    of_scores = torch._softmax_backward_data(torch.bmm(grad, block.seen(given.values).mT), p, -1, p.dtype)
    scale = scale_of(grad)
    add_product(grads[-3], block.heads, block.rows, of_scores, block.seen(given.keys), scale)
    for part, columns in given.uncommon():
        add_product(grads[3 * part], block.heads, block.rows, of_scores[..., columns], given.k[part][block.heads], scale)
    for part, columns in enumerate(given.layout.columns):
        columns = block.within(columns)
        keys = slice(0, columns.stop - columns.start)
        add_product(grads[3 * part + 1], block.heads, keys, of_scores[..., columns].mT, block.of(given.q[part]))
        add_product(grads[3 * part + 2], block.heads, keys, p[..., columns].mT, grad)


def add_product(total: Tensor | None, heads: slice, rows: slice, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Add a product, scaled, to some heads and rows of a gradient [BH, N, D], if it is wanted."""
    if total is not None:
        total[heads, rows].add_(torch.bmm(left, right), alpha=scale)


def heads_first(tensor: Tensor) -> Tensor:
    """[B, N, H, D] -> [BH, N, D]."""
    return tensor.transpose(1, 2).flatten(0, 1)


@hookimpl
def lswt_components() -> list[type]:
    """Offer blocked attention."""
    return [Blocked]
