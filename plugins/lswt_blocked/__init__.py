"""Attention on a CPU by matrix products, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, AttentionRequirements, Dims, KVBlock, Unsupported
from lswt_core.plugin_api.attention import distinct_queries, reference_attention, softmax_scale

FEW = 4  # queries for which blocks are not worth their preparation
BLOCK = 1 << 23  # scores that exist at once: they stay in a CPU's shared cache
# bytes of softmax weights that a layer keeps for its backward pass; where there are more, they are
# computed anew
KEPT = 1 << 25
# queries of a block: more of them waste products on keys that lie ahead, fewer make poor ones
ROWS = 256


class Blocked(AttentionBackend):
    """Exact attention whose scores exist for a block of queries at a time, and are computed anew in
    the backward pass if they are many.

    The idea of memory-efficient attention (Rabe and Staats 2021, arXiv 2112.05682) in the form that
    suits a CPU: in bfloat16 its matrix products are several times as fast as torch's fused
    attention kernel, and the softmax between them stays in the cache. Keys behind the causal
    triangle's blocks are skipped, and keys and values that take no gradient, as remembered ones,
    cost none. Scores are rounded to the compute precision, softmax is taken in float32 at least.
    """

    name = "blocked"
    citation = """@article{rabe2021selfattention,
  title={Self-attention Does Not Need O(n^2) Memory},
  author={Rabe, Markus N and Staats, Charles},
  journal={arXiv preprint arXiv:2112.05682}, year={2021}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)

    def require(self, need: AttentionRequirements) -> None:
        """CPUs only; neither biases nor second derivatives."""
        if need.device != "cpu":
            raise Unsupported(
                f"blocked attention is made for CPUs, the device is {need.device}; use 'auto'"
            )
        if need.has_bias:
            raise Unsupported("blocked attention adds no position biases; use 'sdpa' or 'eager'")
        if need.double_backward:
            raise Unsupported("blocked attention has no second derivative; use attention 'eager'")

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        """One softmax over the union of parts: -> [B, T, H, D]."""
        assert all(part.bias is None for part in parts), "refused by `require`"
        if parts[0].q.shape[1] <= FEW:
            return reference_attention(parts)  # keys and values are left where they lie
        parts = sorted(parts, key=lambda part: part.causal)  # the triangle last
        queries, met = distinct_queries(parts)
        tensors = [*(part.k for part in parts), *(part.v for part in parts), *queries]
        out: Tensor = BlockedAttend.apply(PartLayout.of(parts, met), *tensors)
        return out


class PartLayout(NamedTuple):
    """How parts lie side by side in a block's scores."""

    columns: tuple[slice, ...]  # of every part
    met: tuple[int, ...]  # by which queries every part is met
    causal: bool  # whether the last part is the new segment's triangle
    # of every part: bool [B or 1, T, N], what documents and windows leave to see
    seen: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, parts: Sequence[KVBlock], met: Sequence[int]) -> PartLayout:
        """The layout of parts, the triangle last."""
        ends = list(accumulate(part.k.shape[1] for part in parts))
        return cls(
            tuple(slice(end - part.k.shape[1], end) for end, part in zip(ends, parts, strict=True)),
            tuple(met),
            parts[-1].causal,
            tuple(
                None
                if p.first_visible is None or p.positions is None
                else p.positions[None, None, :] >= p.first_visible[:, :, None]
                for p in parts
            ),
        )

    @property
    def apart(self) -> list[int]:
        """Parts that bring queries of their own; the others are met by the last one's."""
        return [part for part, query in enumerate(self.met) if query != self.met[-1]]

    def blocks(self, q: Tensor) -> Iterator[QueryBlock]:
        """All blocks of the queries [BH, T, D]; what lies ahead of all of a block's queries is left
        out.
        """
        keys, length = self.columns[-1].stop, q.shape[1]
        heads = max(1, BLOCK // keys // min(ROWS, length))
        for first in range(0, len(q), heads):
            for start in range(0, length, ROWS):
                stop = min(start + ROWS, length)
                yield QueryBlock(
                    slice(first, first + heads),
                    slice(start, stop),
                    keys - (length - stop) * self.causal,
                )


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
    q: Tensor  # [BH, T, D], scaled: the queries that the last part is met by
    keys: Tensor  # [BH, N, D] of all parts, zero where one brings its own queries
    values: Tensor  # [BH, N, D] of all parts
    # of every part that does: queries [BH, T, D], scaled, and keys [BH, n, D]
    own: Sequence[Tensor]

    @classmethod
    def of(cls, layout: PartLayout, tensors: Sequence[Tensor]) -> BlockInputs:
        """From keys of every part, values of every part, and the different queries, all [B, N or T,
        H, D]; each is copied once.
        """
        n = len(layout.met)
        keys, values, queries = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        own = [
            (scaled(queries[layout.met[part]]), side_by_side([keys[part]])) for part in layout.apart
        ]
        common = [
            torch.zeros_like(key) if part in layout.apart else key for part, key in enumerate(keys)
        ]
        return cls(
            layout,
            scaled(queries[layout.met[-1]]),
            side_by_side(common),
            side_by_side(values),
            [t for pair in own for t in pair],
        )

    def weights(self, block: QueryBlock) -> Tensor:
        """Softmax of a block's scores, [bh, t, n]. Whole products are faster than products of
        slices, which would be copied: so a sink's scores are computed twice, and the second time is
        right.
        """
        scores = torch.bmm(block.of(self.q), block.seen(self.keys).mT)
        for columns, q, k in self.apart():
            scores[..., columns] = torch.bmm(block.of(q), k[block.heads].mT)
        self.hide(scores, block)
        return scores.softmax(-1)

    def apart(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Columns, queries and keys of parts that bring their own queries."""
        return zip(
            (self.layout.columns[part] for part in self.layout.apart),
            self.own[::2],
            self.own[1::2],
            strict=True,
        )

    def hide(self, scores: Tensor, block: QueryBlock) -> None:
        """Take what a query must not see out of a block's scores [bh, t, n]."""
        if self.layout.causal:
            triangle = scores[..., block.rows.start - block.rows.stop :]
            # faster than masked_fill_
            triangle.add_(triangle.new_full(triangle.shape[1:], float("-inf")).triu_(1))
        for columns, seen in zip(self.layout.columns, self.layout.seen, strict=True):
            if seen is not None:
                part = scores[..., block.within(columns)]
                hidden = ~seen[:, block.rows, : part.shape[-1]]  # [B or 1, t, n]
                if len(hidden) > 1:
                    # [bh, t, n]
                    hidden = hidden.repeat_interleave(len(self.keys) // len(hidden), dim=0)[
                        block.heads
                    ]
                part.masked_fill_(hidden, float("-inf"))


class BlockedAttend(torch.autograd.Function):
    """Attention over parts, the triangle last; the softmax is kept for the backward pass if it is
    small, else nothing but the inputs.
    """

    @staticmethod
    def forward(ctx: Any, layout: PartLayout, *tensors: Tensor) -> Tensor:
        """Keys of every part, values of every part and the different queries, [B, N or T, H, D] ->
        [B, T, H, D].
        """
        given = BlockInputs.of(layout, tensors)
        out = torch.empty_like(given.q)
        size = out.shape[0] * out.shape[1] * layout.columns[-1].stop * out.element_size()
        kept = []
        for block in layout.blocks(out):
            p = given.weights(block)
            out[block.heads, block.rows] = torch.bmm(p, block.seen(given.values))
            if size <= KEPT and any(ctx.needs_input_grad):
                kept.append(p)
        ctx.layout, ctx.heads, ctx.own = layout, tensors[0].shape[2], len(given.own)
        ctx.save_for_backward(given.q, given.keys, given.values, *given.own, *kept)
        return heads_inside(out, ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of those keys and values that want one, and of the queries."""
        layout: PartLayout = ctx.layout
        # to be asked for once, or activation checkpointing runs the layer once more
        q, keys, values, *others = ctx.saved_tensors
        given, kept = BlockInputs(layout, q, keys, values, others[: ctx.own]), others[ctx.own :]
        grad, n = side_by_side([grad]), len(layout.met)
        into = BlockGradients.room(given, ctx.needs_input_grad[1 : 2 * n + 1])
        for i, block in enumerate(layout.blocks(grad)):
            differentiate(given, block, kept[i] if kept else given.weights(block), grad, into)
        of_queries: list[Tensor] = [into.q, *into.own]
        met = [layout.met[-1], *(layout.met[part] for part in layout.apart)]
        by_query = [
            reduce(
                torch.add,
                [g for g, positions in zip(of_queries, met, strict=True) if positions == query],
            )
            for query in range(1 + max(met))
        ]
        found = (
            None if g is None else heads_inside(g, ctx.heads, grad.dtype)
            for g in (*into.keys, *into.values, *by_query)
        )
        return (
            None,
            *(g if want else None for g, want in zip(found, ctx.needs_input_grad[1:], strict=True)),
        )


class BlockGradients(NamedTuple):
    """Gradients as blocks add to them or, queries being in one block each, write them."""

    q: Tensor  # [BH, T, D]
    own: Sequence[Tensor]  # [BH, T, D], of queries that parts bring themselves
    keys: Sequence[Tensor | None]  # [BH, n, D] of every part that wants one, in float32 at least
    values: Sequence[Tensor | None]  # the same

    @classmethod
    def room(cls, given: BlockInputs, wanted: Sequence[bool]) -> BlockGradients:
        """Memory for them; ``wanted`` are keys and then values of every part."""
        wide = torch.promote_types(given.q.dtype, torch.float32)
        columns = (*given.layout.columns, *given.layout.columns)
        shapes = [(given.q.shape[0], part.stop - part.start, given.q.shape[2]) for part in columns]
        sums = [
            given.q.new_zeros(shape, dtype=wide) if want else None
            for shape, want in zip(shapes, wanted, strict=True)
        ]
        n = len(sums) // 2
        return cls(
            torch.empty_like(given.q),
            [torch.empty_like(q) for q in given.own[::2]],
            sums[:n],
            sums[n:],
        )


def differentiate(
    given: BlockInputs, block: QueryBlock, p: Tensor, grad: Tensor, into: BlockGradients
) -> None:
    """Take in what a block with weights p [bh, t, n] contributes to the gradients of queries, keys
    and values of every part.
    """
    grad = block.of(grad)  # [bh, t, D]
    of_scores = torch._softmax_backward_data(
        torch.bmm(grad, block.seen(given.values).mT), p, -1, p.dtype
    )
    scale = softmax_scale(grad)
    into.q[block.heads, block.rows] = torch.bmm(of_scores, block.seen(given.keys)).mul_(scale)
    for (columns, _, k), of_q in zip(given.apart(), into.own, strict=True):
        of_q[block.heads, block.rows] = torch.bmm(of_scores[..., columns], k[block.heads]).mul_(
            scale
        )
    queries = {part: q for part, (_, q, _) in zip(given.layout.apart, given.apart(), strict=True)}
    for part, columns in enumerate(given.layout.columns):
        columns = block.within(columns)
        keys = slice(0, columns.stop - columns.start)
        add_product(
            into.keys[part],
            block.heads,
            keys,
            of_scores[..., columns].mT,
            block.of(queries.get(part, given.q)),
        )
        add_product(into.values[part], block.heads, keys, p[..., columns].mT, grad)


def add_product(
    total: Tensor | None, heads: slice, rows: slice, left: Tensor, right: Tensor
) -> None:
    """Add a product to some heads and rows of a gradient [BH, N, D], if it is wanted."""
    if total is not None:
        total[heads, rows] += torch.bmm(left, right)


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Several [B, n, H, D] -> one [BH, N, D]."""
    return torch.cat([tensor.transpose(1, 2) for tensor in tensors], dim=2).flatten(0, 1)


def scaled(q: Tensor) -> Tensor:
    """Queries [B, T, H, D] -> [BH, T, D], times 1 / sqrt(D)."""
    q = q.transpose(1, 2)
    return q.new_empty(q.shape).copy_(q).mul_(softmax_scale(q)).flatten(0, 1)


def heads_inside(tensor: Tensor, heads: int, dtype: torch.dtype | None = None) -> Tensor:
    """[BH, N, D] -> [B, N, H, D], where heads lie beside each other as the next projection wants
    them.
    """
    tensor = tensor.unflatten(0, (-1, heads)).transpose(1, 2)
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device).copy_(
        tensor
    )


@hookimpl
def lswt_components() -> list[type]:
    """Offer blocked attention."""
    return [Blocked]
