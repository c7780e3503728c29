"""Attention over key/value blocks as an autograd function: a tile of queries at a time, the softmax
recomputed in the backward pass unless it is small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lswt_blocked.heads import (
    concatenate_tensors,
    flatten_queries,
    scale_queries,
    unflatten_heads,
    unflatten_queries,
    visible_by_group,
)
from lswt_core.interfaces import KVBlock
from lswt_core.plugin_api.attention import distinct_queries, softmax_scale

TILE_SCORES = 1 << 23  # scores that exist at once: they fit a CPU's shared cache
# Bytes of softmax weights that a layer saves for its backward pass; more are recomputed.
SAVED_BYTES = 1 << 25
# Queries of a tile: more waste products on keys above the diagonal, fewer make slow products.
TILE_QUERIES = 256


def attend_tiles(blocks: Sequence[KVBlock]) -> Tensor:
    """One softmax over the keys of all blocks, the causal one last: -> [B, T, H, D]."""
    queries, query_index = distinct_queries(blocks)
    tensors = [*(block.k for block in blocks), *(block.v for block in blocks), *queries]
    out: Tensor = TiledAttention.apply(BlockLayout.of(blocks, query_index), *tensors)
    return out


class BlockLayout(NamedTuple):
    """How the keys of several blocks are concatenated, N in all."""

    columns: tuple[slice, ...]  # of every block, within N
    query_index: tuple[int, ...]  # of every block: which of the distinct queries attends to it
    causal: bool  # whether the last block is causal
    # Of every block: bool [B or 1, G or 1, T, H/G or 1, n], the keys that each query sees but for
    # the causal mask; None: all.
    visible: tuple[Tensor | None, ...]
    groups: int  # G, key/value heads; query heads h // (H/G) share one
    queries_per_kv: int  # H/G

    @classmethod
    def of(cls, blocks: Sequence[KVBlock], query_index: Sequence[int]) -> BlockLayout:
        """The layout of blocks, the causal one last."""
        columns, visible, start = [], [], 0
        for block in blocks:
            stop = start + block.k.shape[1]
            columns.append(slice(start, stop))
            visible.append(visible_by_group(block))
            start = stop
        groups = blocks[-1].k.shape[2]
        sizes = groups, blocks[-1].q.shape[2] // groups
        return cls(tuple(columns), tuple(query_index), blocks[-1].causal, tuple(visible), *sizes)

    # Methods in place of properties: torch 2.10 does not trace those of named tuples.
    def separate_indices(self) -> list[int]:
        """Blocks that other queries attend to than the last block's (sinks)."""
        last = self.query_index[-1]
        return [block for block, index in enumerate(self.query_index) if index != last]

    def tiles(self, q: Tensor) -> Iterator[QueryTile]:
        """The tiles of queries [BG, T R, D]."""
        n_keys, length = self.columns[-1].stop, q.shape[1] // self.queries_per_kv
        tokens = max(1, TILE_QUERIES // self.queries_per_kv)
        heads = max(1, TILE_SCORES // n_keys // (min(tokens, length) * self.queries_per_kv))
        for head in range(0, len(q), heads):
            for start in range(0, length, tokens):
                stop = min(start + tokens, length)
                keys = n_keys
                if self.causal:
                    keys -= length - stop  # above the diagonal for every query of the tile
                heads_of_tile, own = slice(head, head + heads), slice(start, stop)
                yield QueryTile(heads_of_tile, own, keys, self.queries_per_kv)


class QueryTile(NamedTuple):
    """Some queries of some key/value heads, and the keys that they attend to."""

    heads: slice  # of BG
    tokens: slice  # of T
    keys: int  # the first so many of N
    queries_per_kv: int  # R

    def rows(self) -> slice:
        """Its rows of T R: the queries of a group's heads are neighbours."""
        first, last = self.tokens.start, self.tokens.stop
        return slice(first * self.queries_per_kv, last * self.queries_per_kv)

    def query_rows(self, tensor: Tensor) -> Tensor:
        """Its rows of queries, outputs or their gradients, [BG, T R, D] -> [bg, t R, D]."""
        return tensor[self.heads, self.rows()]

    def key_rows(self, tensor: Tensor) -> Tensor:
        """Its rows of keys or values, [BG, N, D] -> [bg, n, D]."""
        return tensor[self.heads, : self.keys]

    def clip(self, columns: slice) -> slice:
        """The columns of a block that it attends to."""
        return slice(columns.start, min(columns.stop, self.keys))


class SeparateQueries(NamedTuple):
    """A block with queries of its own."""

    columns: slice
    q: Tensor  # [BG, T R, D], scaled
    k: Tensor  # [BG, n, D]


class TileInputs(NamedTuple):
    """Inputs of all tiles. Batch and key/value heads are one dimension, BG; queries and the R = H/G
    heads of a group are one, T R.
    """

    layout: BlockLayout
    q: Tensor  # [BG, T R, D], scaled: the queries of the last block
    keys: Tensor  # [BG, N, D] of all blocks, zero for blocks with separate queries
    values: Tensor  # [BG, N, D] of all blocks
    # q [BG, T R, D], scaled, and k [BG, n, D] of every block with separate queries, one after
    # another
    separate: Sequence[Tensor]

    @classmethod
    def of(cls, layout: BlockLayout, tensors: Sequence[Tensor]) -> TileInputs:
        """From the keys of every block, the values of every block, all [B, N, G, D], and the
        distinct queries [B, T, H, D]; each is copied once.
        """
        n = len(layout.columns)
        keys, values, queries = list(tensors[:n]), tensors[n : 2 * n], tensors[2 * n :]
        separate: list[Tensor] = []
        for block in layout.separate_indices():
            separate.append(scale_queries(queries[layout.query_index[block]], layout.groups))
            separate.append(concatenate_tensors([keys[block]]))
            keys[block] = torch.zeros_like(keys[block])
        q = scale_queries(queries[layout.query_index[-1]], layout.groups)
        return cls(layout, q, concatenate_tensors(keys), concatenate_tensors(values), separate)

    def separate_blocks(self) -> Iterator[SeparateQueries]:
        """The blocks with separate queries."""
        for i, block in enumerate(self.layout.separate_indices()):
            q, k = self.separate[2 * i : 2 * i + 2]
            yield SeparateQueries(self.layout.columns[block], q, k)

    def weights(self, tile: QueryTile) -> Tensor:
        """Softmax over the scores of a tile, [bg, t R, n].

        One product over all keys is faster than products over slices, which would be copied. So the
        scores of blocks with separate queries are computed twice and overwritten.
        """
        scores = torch.bmm(tile.query_rows(self.q), tile.key_rows(self.keys).mT)
        for columns, q, k in self.separate_blocks():
            scores[..., columns] = torch.bmm(tile.query_rows(q), k[tile.heads].mT)
        self.mask(scores, tile)
        return scores.softmax(-1)

    def mask(self, scores: Tensor, tile: QueryTile) -> None:
        """Set scores [bg, t R, n] of invisible keys to -inf, in place."""
        scores = scores.unflatten(1, (-1, tile.queries_per_kv))  # [bg, t, R, n]
        if self.layout.causal:
            size = tile.tokens.stop - tile.tokens.start
            square = scores[..., -size:]
            # faster than masked_fill_
            above = square.new_full((size, size), float("-inf")).triu_(1)
            square.add_(above[:, None])
        for columns, visible in zip(self.layout.columns, self.layout.visible, strict=True):
            if visible is None:
                continue
            block_scores = scores[..., tile.clip(columns)]
            hidden = ~visible[:, :, tile.tokens, :, : block_scores.shape[-1]]
            block_scores.masked_fill_(self.of_heads(hidden, tile.heads), float("-inf"))

    def of_heads(self, mask: Tensor, heads: slice) -> Tensor:
        """A mask [B or 1, G or 1, ...] of some heads of BG, [bg or 1, ...]."""
        rows, groups = mask.shape[:2]
        if rows == groups == 1:
            return mask[0]
        index = torch.arange(len(self.keys), device=mask.device)[heads]
        row, group = index // self.layout.groups, index % self.layout.groups
        return mask[row * int(rows > 1), group * int(groups > 1)]


class TileGradients(NamedTuple):
    """Gradients. Tiles add to those of keys and values, and write those of queries."""

    q: Tensor  # [BG, T R, D]
    separate: Sequence[Tensor]  # [BG, T R, D] of separate queries
    # [BG, n, D] of every block, in float32 at least; None: not needed
    keys: Sequence[Tensor | None]
    values: Sequence[Tensor | None]  # as keys

    @classmethod
    def allocate(cls, inputs: TileInputs, needed: Sequence[bool]) -> TileGradients:
        """``needed``: for the keys of every block, then for the values of every block."""
        dtype = torch.promote_types(inputs.q.dtype, torch.float32)
        columns = inputs.layout.columns
        sums: list[Tensor | None] = []
        for block, need in zip((*columns, *columns), needed, strict=True):
            shape = (inputs.q.shape[0], block.stop - block.start, inputs.q.shape[2])
            sums.append(inputs.q.new_zeros(shape, dtype=dtype) if need else None)
        separate = [torch.empty_like(block.q) for block in inputs.separate_blocks()]
        n = len(columns)
        return cls(torch.empty_like(inputs.q), separate, sums[:n], sums[n:])

    def add_tile(self, inputs: TileInputs, tile: QueryTile, p: Tensor, grad: Tensor) -> None:
        """Take in a tile with softmax weights p [bg, t R, n] and the output's gradient
        [BG, T R, D].
        """
        grad = tile.query_rows(grad)  # [bg, t R, D]
        dp = torch.bmm(grad, tile.key_rows(inputs.values).mT)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # of the scores
        scale = softmax_scale(grad)
        self.q[tile.heads, tile.rows()] = torch.bmm(ds, tile.key_rows(inputs.keys)).mul_(scale)
        queries = [inputs.q] * len(inputs.layout.columns)
        for block, (columns, q, k), dq in zip(
            inputs.layout.separate_indices(), inputs.separate_blocks(), self.separate, strict=True
        ):
            dq[tile.heads, tile.rows()] = torch.bmm(ds[..., columns], k[tile.heads]).mul_(scale)
            queries[block] = q
        for block, columns in enumerate(inputs.layout.columns):
            columns = tile.clip(columns)
            rows = slice(0, columns.stop - columns.start)
            dk, dv = self.keys[block], self.values[block]
            if dk is not None:
                q = tile.query_rows(queries[block])
                dk[tile.heads, rows] += torch.bmm(ds[..., columns].mT, q)
            if dv is not None:
                dv[tile.heads, rows] += torch.bmm(p[..., columns].mT, grad)

    def by_distinct_query(self, layout: BlockLayout) -> list[Tensor]:
        """The gradient of every distinct query, [BG, T R, D]: a sum over the blocks it attends
        to.
        """
        indices = [
            layout.query_index[-1],
            *(layout.query_index[b] for b in layout.separate_indices()),
        ]
        gradients: list[list[Tensor]] = [[] for _ in range(1 + max(indices))]
        for index, gradient in zip(indices, [self.q, *self.separate], strict=True):
            gradients[index].append(gradient)
        return [reduce(torch.add, terms) for terms in gradients]


class TiledAttention(torch.autograd.Function):
    """Attention over key/value blocks, the causal one last."""

    @staticmethod
    def forward(ctx: Any, layout: BlockLayout, *tensors: Tensor) -> Tensor:
        """Keys of every block, values of every block, [B, N, G, D], and the distinct queries
        [B, T, H, D] -> [B, T, H, D].
        """
        inputs = TileInputs.of(layout, tensors)
        out = torch.empty_like(inputs.q)
        n_scores = out.shape[0] * out.shape[1] * layout.columns[-1].stop
        save = n_scores * out.element_size() <= SAVED_BYTES and any(ctx.needs_input_grad)
        weights = []
        for tile in layout.tiles(out):
            p = inputs.weights(tile)
            out[tile.heads, tile.rows()] = torch.bmm(p, tile.key_rows(inputs.values))
            if save:
                weights.append(p)
        ctx.layout, ctx.n_separate = layout, len(inputs.separate)
        ctx.save_for_backward(inputs.q, inputs.keys, inputs.values, *inputs.separate, *weights)
        return unflatten_queries(out, layout.groups, layout.queries_per_kv)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the keys, values and queries that need one."""
        layout: BlockLayout = ctx.layout
        # Unpacked once: activation checkpointing would recompute the layer for a second access.
        q, keys, values, *others = ctx.saved_tensors
        inputs = TileInputs(layout, q, keys, values, others[: ctx.n_separate])
        weights = others[ctx.n_separate :]
        n = len(layout.columns)
        gradients = TileGradients.allocate(inputs, ctx.needs_input_grad[1 : 2 * n + 1])
        out_grad = flatten_queries(grad, layout.groups)
        for i, tile in enumerate(layout.tiles(out_grad)):
            p = weights[i] if weights else inputs.weights(tile)
            gradients.add_tile(inputs, tile, p, out_grad)
        results: list[Tensor | None] = [None]
        for gradient in (*gradients.keys, *gradients.values):
            if gradient is not None:
                gradient = unflatten_heads(gradient, layout.groups, grad.dtype)
            results.append(gradient)
        heads = layout.groups, layout.queries_per_kv
        queries = gradients.by_distinct_query(layout)
        for gradient, needed in zip(queries, ctx.needs_input_grad[2 * n + 1 :], strict=True):
            results.append(unflatten_queries(gradient, *heads) if needed else None)
        return tuple(results)
