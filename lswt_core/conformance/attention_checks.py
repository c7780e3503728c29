"""Checks of attention backends against attention in plain operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, Subject
from lswt_core.conformance.tensors import max_difference, random_normal
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    DenseBias,
    Dims,
    KVBlock,
    SoftCap,
    Unsupported,
)
from lswt_core.plugin_api.attention import attention_scores, grouped_matmul

SINKS_CASE = 2  # of plain_cases
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}


def plain_attention(blocks: list[KVBlock]) -> Tensor:
    """One softmax over the union of blocks, [B, T, H, D]."""
    weights = torch.cat([attention_scores(block) for block in blocks], dim=-1).softmax(-1)
    values = torch.cat([block.v for block in blocks], dim=1).transpose(1, 2)
    return grouped_matmul(weights.to(values.dtype), values).transpose(1, 2)


def make_cases(dtype: torch.dtype) -> Iterator[tuple[str, AttentionRequirements, list[KVBlock]]]:
    """Key/value blocks as models make them: the new segment alone, with a KV cache, with sinks,
    with document masking, with a bias, with transformed scores, with keys selected per query.
    """
    yield from plain_cases(dtype, DIMS.n_heads, 1)
    for name, need, blocks in plain_cases(dtype, 2 * DIMS.n_heads, 2):
        yield f"{name}, of grouped heads", need, blocks
    _, need, blocks = list(plain_cases(dtype, DIMS.n_heads, 1))[SINKS_CASE]
    cap = SoftCap(0.5)
    capped = [block._replace(transform=cap) for block in blocks]
    yield "transformed scores", need._replace(transform=SoftCap), capped

    generator = torch.Generator().manual_seed(5)
    selected = []
    for block in blocks:
        shape = (2, 1, block.q.shape[1], block.k.shape[1])
        chosen = torch.rand(shape, generator=generator) < 0.5
        # every query sees itself
        chosen = chosen | torch.eye(*shape[-2:], dtype=torch.bool) if block.causal else chosen
        selected.append(block._replace(selected=chosen))
    yield "keys selected per query", need._replace(has_selection=True), selected


def plain_cases(
    dtype: torch.dtype, heads: int, queries_per_kv: int
) -> Iterator[tuple[str, AttentionRequirements, list[KVBlock]]]:
    """Cases with any number of query heads, of which some share a key/value head."""
    B, T, N, D = 2, 5, 7, DIMS.d_head
    G, H = heads // queries_per_kv, heads
    q = random_normal(B, T, H, D, seed=1, dtype=dtype)
    sink_q = random_normal(B, T, H, D, seed=2, dtype=dtype)

    def make_block(q: Tensor, length: int, *, causal: bool = False) -> KVBlock:
        k = random_normal(B, length, G, D, seed=length, dtype=dtype)
        v = random_normal(B, length, G, D, seed=length + 9, dtype=dtype)
        return KVBlock(q, k, v, causal)

    new = make_block(q, T, causal=True)._replace(positions=torch.arange(T))
    old = make_block(q, N)._replace(positions=torch.arange(-N, 0))
    sinks = make_block(sink_q, 2)
    need = AttentionRequirements("cpu", dtype, D, queries_per_kv=queries_per_kv)
    yield "the new segment alone", need, [new]
    yield "a KV cache", need, [old, new]
    yield "sinks", need, [sinks, old, new]

    first_visible = torch.tensor([[-9, -9, 2, 2, 2], [-3, -3, -3, -3, 4]])
    masked = [block._replace(first_visible=first_visible) for block in (old, new)]
    yield "document masking", need._replace(has_mask=True), masked

    new_bias = DenseBias(random_normal(H, T, T, seed=6, dtype=dtype))
    old_bias = DenseBias(random_normal(H, T, N, seed=7, dtype=dtype))
    biased = [old._replace(bias=old_bias), new._replace(bias=new_bias)]
    yield "a bias", need._replace(has_bias=True), biased


@rule(
    "reference",
    ("attention",),
    why=(
        "backends compute the same function at different speeds; if their numbers differ, an"
        " ablation compares kernels"
    ),
    fix=(
        "compute one softmax over all blocks, scores times 1/sqrt(D); in the causal block key j is"
        " visible to query i iff j <= i, in the others every key is; query head h reads key/value"
        " head h // (H/G); what it cannot do (grouped heads, has_mask, has_bias, has_transform,"
        " has_selection), `require` must refuse"
    ),
    after=("meta device", "randomness"),
)
def matches_plain_attention(subject: Subject) -> None:
    """Outputs and gradients equal those of plain attention, or `require` refuses the case."""
    compared = 0
    for dtype, tolerance in TOLERANCES.items():
        for name, need, blocks in make_cases(dtype):
            n_heads = DIMS.n_heads * need.queries_per_kv
            dims = Dims(n_heads * DIMS.d_head, n_heads, 8, 1, queries_per_kv=need.queries_per_kv)
            backend = subject.build(dims)
            if supports(backend, need):
                compared += 1
                compare(backend, f"{name}, {dtype}", blocks, tolerance)
    if not compared:
        raise SkipTest("it supports none of the cases on the CPU")


def supports(backend: AttentionBackend, need: AttentionRequirements) -> bool:
    """Whether the backend accepts the requirements."""
    try:
        backend.require(need)
    except Unsupported:
        return False
    return True


def compare(backend: AttentionBackend, case: str, blocks: list[KVBlock], tolerance: float) -> None:
    """Require outputs and gradients to be those of plain attention."""
    out, gradients = attend_and_differentiate(backend, blocks)
    expected, expected_gradients = attend_and_differentiate(plain_attention, blocks)
    error = max_difference(out, expected)
    require(error <= tolerance, f"{case}: outputs are off by {error:.2g}")
    error = max(map(max_difference, gradients, expected_gradients))
    require(error <= 10 * tolerance, f"{case}: gradients are off by {error:.2g}")


def attend_and_differentiate(
    attend: Callable[[list[KVBlock]], Tensor], blocks: list[KVBlock]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and the gradients of all queries, keys and values. A tensor that several blocks
    share stays shared.
    """
    inputs = {id(t): t for block in blocks for t in (block.q, block.k, block.v)}
    leaves = {key: tensor.clone().requires_grad_() for key, tensor in inputs.items()}
    out = attend(
        [
            block._replace(q=leaves[id(block.q)], k=leaves[id(block.k)], v=leaves[id(block.v)])
            for block in blocks
        ]
    )
    weighted = out * random_normal(*out.shape, seed=8, dtype=out.dtype)
    return out.detach(), torch.autograd.grad(weighted.sum(), list(leaves.values()))


@rule(
    "low precision",
    ("attention",),
    why="in bfloat16 a backend may round differently than plain attention, but not worse",
    fix="accumulate scores, softmax and sums in float32",
    after=("reference",),
)
def rounds_no_worse(subject: Subject) -> None:
    """In bfloat16 the error against float64 is at most twice that of plain attention."""
    backend = subject.build(DIMS)
    if not supports(backend, AttentionRequirements("cpu", torch.bfloat16, DIMS.d_head)):
        raise SkipTest("it does not run in bfloat16 on the CPU")
    with_cache = 1
    _, _, exact = list(make_cases(torch.float64))[with_cache]
    _, _, rounded = list(make_cases(torch.bfloat16))[with_cache]
    expected = plain_attention(exact)
    own_error = float((backend(rounded).double() - expected).norm())
    plain_error = float((plain_attention(rounded).double() - expected).norm())
    require(
        own_error <= 2 * plain_error,
        f"the error in bfloat16 is {own_error:.3g}, that of plain attention {plain_error:.3g}",
    )
