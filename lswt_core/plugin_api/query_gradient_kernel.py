"""The Triton kernel of `lswt_core.plugin_api.query_gradient`, which imports this module where it
launches the kernel: triton is an optional package.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Of float32, three products in TF32 on tensor cores, about as exact as one in float32.
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def query_gradient_kernel(
    grad: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    logsumexp: tl.tensor,
    dq: tl.tensor,
    grad_strides: tl.tuple,
    q_strides: tl.tuple,
    k_strides: tl.tuple,
    v_strides: tl.tuple,
    out_strides: tl.tuple,
    logsumexp_strides: tl.tuple,
    dq_strides: tl.tuple,
    n_queries: tl.tensor,
    n_keys: tl.tensor,
    n_heads: tl.tensor,
    queries_per_kv: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr,
    CAPPED: tl.constexpr,
    WHOLE_TILES: tl.constexpr,
) -> None:
    """A tile of queries of one head, over all keys: the loop over keys of algorithm 2 of Dao 2023
    (arXiv 2307.08691) without dK and dV. Every program writes rows of its own, in one order of
    sums: the result is bitwise repeatable.

    Strides: of all dimensions but the last, whose is 1. PADDED: the head's WIDTH rounded up to a
    power of two. WHOLE_TILES: TILE_K divides the number of keys.
    """
    tiles = tl.cdiv(n_queries, TILE_Q)
    program = tl.program_id(0)
    head = program // tiles % n_heads
    # 64 bits: a tensor may have more than 2^31 elements
    row = (program // tiles // n_heads).to(tl.int64)
    first = (program % tiles * TILE_Q).to(tl.int64)
    left = n_queries - first
    q += row * q_strides[0] + first * q_strides[1] + head * q_strides[2]
    dq += row * dq_strides[0] + first * dq_strides[1] + head * dq_strides[2]
    out += row * out_strides[0] + first * out_strides[1] + head * out_strides[2]
    grad += row * grad_strides[0] + first * grad_strides[1] + head * grad_strides[2]
    k += row * k_strides[0] + head // queries_per_kv * k_strides[2]
    v += row * v_strides[0] + head // queries_per_kv * v_strides[2]
    logsumexp += (
        row * logsumexp_strides[0] + head * logsumexp_strides[1] + first * logsumexp_strides[2]
    )

    queries, keys = tl.arange(0, TILE_Q), tl.arange(0, TILE_K)
    q_tile = load_rows(q, q_strides[1], left, WIDTH, PADDED, TILE_Q, False)
    out_tile = load_rows(out, out_strides[1], left, WIDTH, PADDED, TILE_Q, False)
    grad_tile = load_rows(grad, grad_strides[1], left, WIDTH, PADDED, TILE_Q, False)
    delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    lse = tl.load(logsumexp + queries * logsumexp_strides[2], queries < left, 0.0)
    total = tl.zeros((TILE_Q, PADDED), tl.float32)
    for start in range(0, n_keys, TILE_K):
        k_tile = load_rows(k, k_strides[1], n_keys - start, WIDTH, PADDED, TILE_K, WHOLE_TILES)
        v_tile = load_rows(v, v_strides[1], n_keys - start, WIDTH, PADDED, TILE_K, WHOLE_TILES)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        if CAPPED:
            capped = 2 * tl.sigmoid(scores * (2 / soft_cap)) - 1  # tanh(scores / soft_cap)
            scores = soft_cap * capped
        if not WHOLE_TILES:
            scores = tl.where((keys < n_keys - start)[None, :], scores, float("-inf"))
        p = tl.exp2((scores - lse[:, None]) * LOG2_E)
        dp = tl.dot(grad_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds *= 1 - capped * capped
        total = tl.dot(ds.to(k_tile.dtype), k_tile, total, input_precision=PRECISION)
        k += TILE_K * k_strides[1]
        v += TILE_K * v_strides[1]

    columns = tl.arange(0, PADDED)
    there = (queries < left)[:, None] & (columns < WIDTH)[None, :]
    places = dq + queries[:, None] * dq_strides[1] + columns[None, :]
    tl.store(places, (total * scale).to(dq.dtype.element_ty), there)


@triton.jit
def load_rows(
    first: tl.tensor,
    stride: tl.tensor,
    left: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Load ROWS rows from the ``first`` one on, of which ``left`` exist (all, if WHOLE), [ROWS,
    PADDED]: zeros beyond.
    """
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, PADDED)[None, :]
    places = first + rows * stride + columns
    if WHOLE and PADDED == WIDTH:
        tile = tl.load(places)
    else:
        tile = tl.load(places, (rows < left) & (columns < WIDTH), 0.0)
    return tile
