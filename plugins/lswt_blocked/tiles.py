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
    # Of every block: bool [B or 1, T, n], what document masks and windows leave visible; None: all.
    visible: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, blocks: Sequence[KVBlock], query_index: Sequence[int]) -> BlockLayout:
        """The layout of blocks, the causal one last."""
        columns, visible, start = [], [], 0
        for block in blocks:
            stop = start + block.k.shape[1]
            columns.append(slice(start, stop))
            mask = None
            if block.first_visible is not None and block.positions is not None:
                mask = block.positions[None, None, :] >= block.first_visible[:, :, None]
            visible.append(mask)
            start = stop
        return cls(tuple(columns), tuple(query_index), blocks[-1].causal, tuple(visible))

    @property
    def separate(self) -> list[int]:
        """Blocks that other queries attend to than the last block's (sinks)."""
        last = self.query_index[-1]
        return [block for block, index in enumerate(self.query_index) if index != last]

    def tiles(self, q: Tensor) -> Iterator[QueryTile]:
        """The tiles of queries [BH, T, D]."""
        n_keys, length = self.columns[-1].stop, q.shape[1]
        heads = max(1, TILE_SCORES // n_keys // min(TILE_QUERIES, length))
        for head in range(0, len(q), heads):
            for start in range(0, length, TILE_QUERIES):
                stop = min(start + TILE_QUERIES, length)
                keys = n_keys
                if self.causal:
                    keys -= length - stop  # above the diagonal for every query of the tile
                yield QueryTile(slice(head, head + heads), slice(start, stop), keys)


class QueryTile(NamedTuple):
    """Some queries of some heads, and the keys that they attend to."""

    heads: slice  # of BH
    rows: slice  # of T
    keys: int  # the first so many of N

    def query_rows(self, tensor: Tensor) -> Tensor:
        """Its rows of queries, outputs or their gradients, [BH, T, D] -> [bh, t, D]."""
        return tensor[self.heads, self.rows]

    def key_rows(self, tensor: Tensor) -> Tensor:
        """Its rows of keys or values, [BH, N, D] -> [bh, n, D]."""
        return tensor[self.heads, : self.keys]

    def clip(self, columns: slice) -> slice:
        """The columns of a block that it attends to."""
        return slice(columns.start, min(columns.stop, self.keys))


class SeparateQueries(NamedTuple):
    """A block with queries of its own."""

    columns: slice
    q: Tensor  # [BH, T, D], scaled
    k: Tensor  # [BH, n, D]


class TileInputs(NamedTuple):
    """Inputs of all tiles; batch and heads are one dimension, BH."""

    layout: BlockLayout
    q: Tensor  # [BH, T, D], scaled: the queries of the last block
    keys: Tensor  # [BH, N, D] of all blocks, zero for blocks with separate queries
    values: Tensor  # [BH, N, D] of all blocks
    # q [BH, T, D], scaled, and k [BH, n, D] of every block with separate queries, one after another
    separate: Sequence[Tensor]

    @classmethod
    def of(cls, layout: BlockLayout, tensors: Sequence[Tensor]) -> TileInputs:
        """From the keys of every block, the values of every block, and the distinct queries, all
        [B, N or T, H, D]; each is copied once.
        """
        n = len(layout.columns)
        keys, values, queries = list(tensors[:n]), tensors[n : 2 * n], tensors[2 * n :]
        separate: list[Tensor] = []
        for block in layout.separate:
            separate.append(scale_queries(queries[layout.query_index[block]]))
            separate.append(concatenate_tensors([keys[block]]))
            keys[block] = torch.zeros_like(keys[block])
        q = scale_queries(queries[layout.query_index[-1]])
        return cls(layout, q, concatenate_tensors(keys), concatenate_tensors(values), separate)

    def separate_blocks(self) -> Iterator[SeparateQueries]:
        """The blocks with separate queries."""
        for i, block in enumerate(self.layout.separate):
            q, k = self.separate[2 * i : 2 * i + 2]
            yield SeparateQueries(self.layout.columns[block], q, k)

    def weights(self, tile: QueryTile) -> Tensor:
        """Softmax over the scores of a tile, [bh, t, n].

        One product over all keys is faster than products over slices, which would be copied. So the
        scores of blocks with separate queries are computed twice and overwritten.
        """
        scores = torch.bmm(tile.query_rows(self.q), tile.key_rows(self.keys).mT)
        for columns, q, k in self.separate_blocks():
            scores[..., columns] = torch.bmm(tile.query_rows(q), k[tile.heads].mT)
        self.mask(scores, tile)
        return scores.softmax(-1)

    def mask(self, scores: Tensor, tile: QueryTile) -> None:
        """Set scores [bh, t, n] of invisible keys to -inf, in place."""
        if self.layout.causal:
            square = scores[..., tile.rows.start - tile.rows.stop :]
            # faster than masked_fill_
            square.add_(square.new_full(square.shape[1:], float("-inf")).triu_(1))
        for columns, visible in zip(self.layout.columns, self.layout.visible, strict=True):
            if visible is None:
                continue
            block_scores = scores[..., tile.clip(columns)]
            hidden = ~visible[:, tile.rows, : block_scores.shape[-1]]  # [B or 1, t, n]
            if len(hidden) > 1:
                heads = len(self.keys) // len(hidden)
                hidden = hidden.repeat_interleave(heads, dim=0)[tile.heads]  # [bh, t, n]
            block_scores.masked_fill_(hidden, float("-inf"))


class TileGradients(NamedTuple):
    """Gradients. Tiles add to those of keys and values, and write those of queries."""

    q: Tensor  # [BH, T, D]
    separate: Sequence[Tensor]  # [BH, T, D] of separate queries
    keys: Sequence[
        Tensor | None
    ]  # [BH, n, D] of every block, in float32 at least; None: not needed
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
        """Take in a tile with softmax weights p [bh, t, n] and the output's gradient [BH, T, D]."""
        grad = tile.query_rows(grad)  # [bh, t, D]
        dp = torch.bmm(grad, tile.key_rows(inputs.values).mT)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # of the scores
        scale = softmax_scale(grad)
        self.q[tile.heads, tile.rows] = torch.bmm(ds, tile.key_rows(inputs.keys)).mul_(scale)
        queries = [inputs.q] * len(inputs.layout.columns)
        for block, (columns, q, k), dq in zip(
            inputs.layout.separate, inputs.separate_blocks(), self.separate, strict=True
        ):
            dq[tile.heads, tile.rows] = torch.bmm(ds[..., columns], k[tile.heads]).mul_(scale)
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
        """The gradient of every distinct query, [BH, T, D]: a sum over the blocks it attends to."""
        indices = [layout.query_index[-1], *(layout.query_index[b] for b in layout.separate)]
        gradients: list[list[Tensor]] = [[] for _ in range(1 + max(indices))]
        for index, gradient in zip(indices, [self.q, *self.separate], strict=True):
            gradients[index].append(gradient)
        return [reduce(torch.add, terms) for terms in gradients]


class TiledAttention(torch.autograd.Function):
    """Attention over key/value blocks, the causal one last."""

    @staticmethod
    def forward(ctx: Any, layout: BlockLayout, *tensors: Tensor) -> Tensor:
        """Keys of every block, values of every block and the distinct queries, [B, N or T, H, D] ->
        [B, T, H, D].
        """
        inputs = TileInputs.of(layout, tensors)
        out = torch.empty_like(inputs.q)
        n_scores = out.shape[0] * out.shape[1] * layout.columns[-1].stop
        save = n_scores * out.element_size() <= SAVED_BYTES and any(ctx.needs_input_grad)
        weights = []
        for tile in layout.tiles(out):
            p = inputs.weights(tile)
            out[tile.heads, tile.rows] = torch.bmm(p, tile.key_rows(inputs.values))
            if save:
                weights.append(p)
        ctx.layout, ctx.n_heads, ctx.n_separate = layout, tensors[0].shape[2], len(inputs.separate)
        ctx.save_for_backward(inputs.q, inputs.keys, inputs.values, *inputs.separate, *weights)
        return unflatten_heads(out, ctx.n_heads)

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
        out_grad = concatenate_tensors([grad])
        for i, tile in enumerate(layout.tiles(out_grad)):
            p = weights[i] if weights else inputs.weights(tile)
            gradients.add_tile(inputs, tile, p, out_grad)
        flat = (*gradients.keys, *gradients.values, *gradients.by_distinct_query(layout))
        results: list[Tensor | None] = [None]
        for gradient, needed in zip(flat, ctx.needs_input_grad[1:], strict=True):
            if gradient is None or not needed:
                results.append(None)
            else:
                results.append(unflatten_heads(gradient, ctx.n_heads, grad.dtype))
        return tuple(results)


def concatenate_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Several [B, n, H, D] -> one [BH, N, D]."""
    return torch.cat([tensor.transpose(1, 2) for tensor in tensors], dim=2).flatten(0, 1)


def scale_queries(q: Tensor) -> Tensor:
    """Queries [B, T, H, D] -> [BH, T, D], times 1 / sqrt(D)."""
    q = q.transpose(1, 2)
    return q.new_empty(q.shape).copy_(q).mul_(softmax_scale(q)).flatten(0, 1)


def unflatten_heads(tensor: Tensor, n_heads: int, dtype: torch.dtype | None = None) -> Tensor:
    """[BH, N, D] -> [B, N, H, D], contiguous, as the next projection needs it."""
    tensor = tensor.unflatten(0, (-1, n_heads)).transpose(1, 2)
    dtype = dtype or tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)
