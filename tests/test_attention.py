"""Fast attention against the simple one, on shapes drawn at random: outputs and gradients, in every
precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import lswt_blocked.tiles as tiles
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lswt_blocked import Blocked
from lswt_eager import Eager
from lswt_sdpa import Sdpa
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Dims,
    KVBlock,
    SoftCap,
    Unsupported,
)
from lswt_core.plugin_api.attention import attention_scores, reference_attention

BACKENDS: dict[str, Callable[[Dims], AttentionBackend]] = {
    "split": partial(Sdpa, method="split"),
    "joint": partial(Sdpa, method="joint"),
    "blocked": Blocked,
}
SMALLEST = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
}  # relative; bfloat16 within two roundings of the reference in bfloat16
every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Shape(NamedTuple):
    """Sizes of what a backend attends to."""

    rows: int
    tokens: int
    remembered: int
    registers: int
    heads: int  # of keys and values
    shared: int  # query heads for each of them
    width: int
    learned: bool  # whether gradients flow into what is remembered
    own_queries: bool  # whether registers are met by queries of their own
    dtype: torch.dtype


shapes = st.builds(
    Shape,
    rows=st.integers(1, 5),
    tokens=st.integers(1, 70),
    remembered=st.sampled_from([0, 1, 17, 40, 129]),
    registers=st.sampled_from([0, 5, 16]),
    heads=st.integers(1, 3),
    shared=st.sampled_from([1, 1, 2, 3]),
    width=st.sampled_from([32, 64, 128]),
    learned=st.booleans(),
    own_queries=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)


def attention_inputs(
    shape: Shape, dtype: torch.dtype
) -> tuple[list[KVBlock], list[Tensor], Tensor]:
    """Parts, their leaves and a cotangent, the same numbers in any precision: those that bfloat16
    holds.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(size: int, learned: bool = True, shared: int = 1) -> Tensor:
        heads = shape.heads * shared
        numbers = torch.randn(shape.rows, size, heads, shape.width, generator=generator)
        return numbers.to(shape.dtype).to(dtype).requires_grad_(learned)

    q, own = (draw(shape.tokens, shared=shape.shared) for _ in range(2))
    k, v = (draw(shape.tokens) for _ in range(2))
    sink = [own, draw(shape.registers), draw(shape.registers)]
    old = [draw(shape.remembered, shape.learned) for _ in range(2)]
    parts = [KVBlock(sink[0] if shape.own_queries else q, sink[1], sink[2], causal=False)] * (
        shape.registers > 0
    )
    parts += [KVBlock(q, *old, causal=False)] * (shape.remembered > 0)
    parts.append(KVBlock(q, k, v, causal=True))
    leaves = [t for part in parts for t in part[:3] if t.requires_grad]  # type: ignore[union-attr]
    return parts, list({id(t): t for t in leaves}.values()), draw(shape.tokens, False, shape.shared)


def outputs_and_gradients(
    backend: AttentionBackend, shape: Shape, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients, in float64."""
    parts, leaves, cotangent = attention_inputs(shape, dtype)
    out = backend(parts)
    return [t.detach().double() for t in (out, *torch.autograd.grad(out, leaves, cotangent))]


def errors(tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Relative errors in the norm; numbers are of the order of 1, and what cancels to less is held
    to that.
    """
    return [
        float((a - b).norm() / b.norm().clamp_min(0.1 * b.numel() ** 0.5))
        for a, b in zip(tensors, expected, strict=True)
    ]


def missed_by_rounded_outputs(shape: Shape) -> list[Tensor]:
    """What output and gradients may be off by if the output is kept in bfloat16, as fused kernels
    keep it: the gradient of a score is p (g . v - g . out), and g . out is off by as much as 2^-9
    of the terms that it sums.
    """
    parts, leaves, cotangent = attention_inputs(shape, torch.float64)
    joined = torch.cat([attention_scores(part) for part in parts], -1)  # [B, H, T, N]
    # [B, H, T, 1]
    off = 2**-9 * (reference_attention(parts) * cotangent).abs().sum(-1).transpose(1, 2)[..., None]
    finite_scores = joined.masked_fill(joined.isinf(), 0.0)
    gradients = torch.autograd.grad(
        (joined.softmax(-1) * off).detach().mul(finite_scores).sum(), leaves, materialize_grads=True
    )
    return [torch.zeros_like(cotangent), *gradients]


@every_backend
@given(shape=shapes)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_shapes_drawn_at_random(backend: str, shape: Shape) -> None:
    heads = shape.heads * shape.shared
    dims = Dims(heads * shape.width, heads, 8, 1, queries_per_kv=shape.shared)
    actual, expected = (
        outputs_and_gradients(BACKENDS[backend](dims), shape, shape.dtype),
        outputs_and_gradients(Eager(dims), shape, torch.float64),
    )
    allowed: Sequence[float] = (
        [SMALLEST[shape.dtype]] * len(expected) if shape.dtype in SMALLEST else []
    )
    if not allowed:
        simple = errors(outputs_and_gradients(Eager(dims), shape, shape.dtype), expected)
        rounded = errors(
            [a + b for a, b in zip(expected, missed_by_rounded_outputs(shape), strict=True)],
            expected,
        )
        allowed = [2 * error + more + 2**-7 for error, more in zip(simple, rounded, strict=True)]
    assert all(error <= most for error, most in zip(errors(actual, expected), allowed, strict=True))


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize(("rows", "block"), [(1, 1), (3, 100), (16, 1 << 30), (5, 700)])
def test_blocks_of_any_size_are_the_whole(
    rows: int, block: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE_QUERIES", rows)
    monkeypatch.setattr(tiles, "TILE_SCORES", block)
    monkeypatch.setattr(tiles, "SAVED_BYTES", kept)
    shape = Shape(2, 16, 11, 3, 2, 2, 32, learned=True, own_queries=True, dtype=torch.float64)
    dims = Dims(64, 2, 8, 1)
    assert (
        max(
            errors(
                outputs_and_gradients(Blocked(dims), shape, torch.float64),
                outputs_and_gradients(Eager(dims), shape, torch.float64),
            )
        )
        < 1e-12
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cuda"}, "CPU"),
        ({"has_bias": True}, "biases"),
        ({"transform": SoftCap}, "transforms"),
        ({"double_backward": True}, "second derivative"),
    ],
)
def test_what_blocks_cannot_do_is_said(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        Blocked(Dims(64, 2, 8, 1)).require(
            AttentionRequirements("cpu", torch.bfloat16, 32)._replace(**change)
        )


def test_what_is_remembered_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the backward pass: the gradients of weights, queries, and the new tokens' keys
    and values.
    """
    products: list[tuple[int, ...]] = []
    multiply = torch.bmm

    def counted(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        products.append((*a.shape[1:], b.shape[-1]))
        return multiply(a, b, **options)

    shape = Shape(1, 8, 24, 0, 2, 1, 32, learned=False, own_queries=False, dtype=torch.float32)
    parts, leaves, cotangent = attention_inputs(shape, torch.float32)
    out = Blocked(Dims(64, 2, 8, 1))(parts)
    monkeypatch.setattr(torch, "bmm", counted)
    torch.autograd.grad(out, leaves, cotangent)
    assert sorted(products) == [(8, 8, 32), (8, 8, 32), (8, 32, 32), (8, 32, 32)]


def backward_flops(backend: AttentionBackend, shape: Shape) -> int:
    """The matrix products of a backward pass, in FLOPs."""
    parts, leaves, cotangent = attention_inputs(shape, torch.float32)
    out = backend(parts)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out, leaves, cotangent)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("backend", "skipped"), [(Blocked, 2), (Eager, 1)])
def test_remembered_keys_without_a_gradient_cost_none(
    backend: Callable[[Dims], AttentionBackend], skipped: int
) -> None:
    """Of four products with remembered keys and values in a backward pass, those towards keys and
    towards values are left out; plain attention leaves out the former alone.
    """
    shape = Shape(2, 48, 96, 4, 2, 2, 32, learned=True, own_queries=True, dtype=torch.float32)
    heads = shape.heads * shape.shared
    product = 2 * shape.rows * heads * shape.tokens * shape.remembered * shape.width
    attend = backend(Dims(heads * shape.width, heads, 8, 1, queries_per_kv=shape.shared))
    needless = backward_flops(attend, shape) - backward_flops(attend, shape._replace(learned=False))
    assert needless == skipped * product
