"""What recurrent mixers are made of: where documents begin, the short convolution, and chunked
linear attention against the recurrence step by step, with flash-linear-attention's functions
played by that recurrence.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import DIMS, context_of, distance
from lswt_nope import NoPosition
from torch import Tensor
from torch.nn.functional import conv1d, pad

import lswt_core.plugin_api.linear_attention as linear_attention_module
from lswt_core.plugin_api.fla_kernels import forward_operator
from lswt_core.plugin_api.linear_attention import linear_attention
from lswt_core.plugin_api.recurrence import CausalConvolution, document_starts, first_seen

B, T, H, K, V = 2, 23, 2, 3, 5
# row 0: a document from before the segment, then others at 4 and 11; row 1: at 0 and 10
FIRST = torch.tensor([[-3] * 4 + [4] * 7 + [11] * 12, [0] * 10 + [10] * 13])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs() -> list[Tensor]:
    """Queries, keys of length 1, values, log decays and write strengths."""
    q, k, v = random(B, T, H, K, seed=1), random(B, T, H, K, seed=2), random(B, T, H, V, seed=3)
    k = k / k.norm(dim=-1, keepdim=True)
    return [q, k, v, -random(B, T, H, seed=4).abs(), random(B, T, H, seed=5).sigmoid()]


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token."""
    if state is None:
        state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0, state)
        state = state * g[:, t].exp()[..., None, None]
        update = v[:, t]
        if beta is not None:
            update = beta[:, t, :, None] * (update - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], update)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(out, 1), state


def test_documents_start_where_a_token_sees_itself_first() -> None:
    positional = NoPosition(DIMS)
    context = context_of(T, positional, FIRST)
    starts = document_starts(context)
    assert starts is not None and [tuple(pair) for pair in starts.nonzero().tolist()] == [
        (0, 4),
        (0, 11),
        (1, 0),
        (1, 10),
    ]
    later = context._replace(positions=context.positions + 100, first_visible=FIRST + 100)
    assert torch.equal(first_seen(later), FIRST)  # type: ignore[arg-type]
    assert first_seen(context_of(T, positional)) is None
    assert document_starts(context_of(T, positional)) is None


def convolution() -> CausalConvolution:
    layer = CausalConvolution(6, 4, bias=True).double()
    torch.manual_seed(0)
    layer.reset_parameters()
    return layer


def test_the_convolution_is_torchs_in_pieces_of_any_size() -> None:
    layer, x = convolution(), random(B, T, 6, seed=1)
    by_torch = conv1d(pad(x.mT, (3, 0)), layer.weight[:, None], layer.bias, groups=6).mT
    for size in (1, 5, T):
        tail, outputs = None, []
        for piece in x.split(size, dim=1):
            out, tail = layer(piece, tail, None)
            outputs.append(out)
        assert distance(torch.cat(outputs, 1), by_torch) < 1e-14
        assert tail is not None and torch.equal(tail, x[:, -3:])


def test_the_convolution_does_not_cross_documents() -> None:
    layer, x, tail = convolution(), random(B, T, 6, seed=1), random(B, 3, 6, seed=2)
    out, _ = layer(x, tail, FIRST)
    whole, _ = layer(x[:1, :4], tail[:1], None)
    assert distance(out[:1, :4], whole) < 1e-14
    for row, begin, end in ((0, 4, 11), (0, 11, T), (1, 0, 10), (1, 10, T)):
        alone, _ = layer(x[row : row + 1, begin:end], None, None)
        assert distance(out[row, begin:end], alone[0]) < 1e-14


@pytest.mark.parametrize("first", [None, FIRST, FIRST[:1]], ids=["one", "documents", "shared"])
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_are_the_recurrence(first: Tensor | None, delta: bool, chunk: int) -> None:
    *tensors, beta = inputs()
    state, write = random(B, H, K, V, seed=6), beta if delta else None
    starts = None if first is None else (first == torch.arange(T)).expand(B, T)
    expected = recurrence(*tensors, write, state, starts)
    chunked = linear_attention(*tensors, state, first, write=write, chunk=chunk)
    assert distance(chunked[0], expected[0]) < 1e-13 and distance(chunked[1], expected[1]) < 1e-13


def test_long_decays_neither_overflow_nor_lose_gradients() -> None:
    q, k, v, g, beta = (t.float() for t in inputs())
    g = (g * 200).requires_grad_()  # over a chunk, exp of the difference is far out of range
    out, _ = linear_attention(q, k, v, g, write=beta)
    out.sum().backward()
    assert out.isfinite().all() and g.grad is not None and g.grad.isfinite().all()


def test_first_and_second_derivatives() -> None:
    q, k, v, g, beta = (t[:1, :4, :1].clone().requires_grad_() for t in inputs())
    state = random(1, 1, K, V, seed=6).requires_grad_()
    first = torch.tensor([[-1, -1, 2, 2]])

    def function(*tensors: Tensor) -> Tensor:
        *main, write, state = tensors
        out, after = linear_attention(*main, state, first, write=write, chunk=3)
        return out.sum() + (after**2).sum()

    given = (q, k, v, g, beta, state)
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


def test_half_precision_is_summed_in_float32() -> None:
    tensors = inputs()
    half = [t.bfloat16() for t in tensors]
    out, state = linear_attention(*half[:4], write=half[4])
    expected, _ = linear_attention(*(t.float() for t in half[:4]), write=half[4].float())
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, expected.bfloat16())


# ---------- flash-linear-attention, whose kernels need a GPU


def kernel_of(delta: bool) -> Any:
    """A function with the signature and contract of the package's."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert (beta is not None) == delta and output_final_state
        assert all(t.is_contiguous() for t in (q, k, v, g))
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        if cu_seqlens is None:
            return recurrence(q, k, v, g, beta, initial_state)
        assert len(q) == 1 and initial_state is not None
        outs, states = [], []
        for i, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
            piece = [None if t is None else t[:, begin:end] for t in (q, k, v, g, beta)]
            out, state = recurrence(*piece, initial_state[i : i + 1])  # type: ignore[arg-type]
            outs.append(out)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states)

    return run


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, simple = ModuleType("fla.ops.gated_delta_rule"), ModuleType("fla.ops.simple_gla")
    delta.chunk_gated_delta_rule = kernel_of(True)  # type: ignore[attr-defined]
    simple.chunk_simple_gla = kernel_of(False)  # type: ignore[attr-defined]
    for module in (ModuleType("fla"), ModuleType("fla.ops"), delta, simple):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(linear_attention_module, "fla_can_run", lambda q, v: True)


@pytest.mark.parametrize("first", [None, FIRST, FIRST[:1]], ids=["one", "documents", "shared"])
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
def test_the_kernels_are_given_what_the_plain_form_computes(
    fla: None, first: Tensor | None, delta: bool
) -> None:
    given = [*inputs(), random(B, H, K, V, seed=6)]
    results = []
    for use_fla in (True, False):
        leaves = [t.clone().requires_grad_() for t in given]
        *tensors, beta, state = leaves
        write = beta if delta else None
        out, after = linear_attention(*tensors, state, first, write=write, use_fla=use_fla)
        ((out * random(*out.shape, seed=7)).sum() + (after**2).sum()).backward()
        grads = [t.grad for t in leaves if t.grad is not None]
        results.append([out.detach(), after.detach(), *grads])
    assert len(results[0]) == (8 if delta else 7)
    assert max(map(distance, *results)) < 1e-12


def test_the_kernels_cannot_be_differentiated_twice(fla: None) -> None:
    tensors = [t.requires_grad_() for t in inputs()[:4]]
    out, _ = linear_attention(*tensors)
    (gradient,) = torch.autograd.grad((out**2).sum(), tensors[0], create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(gradient.sum(), tensors[1])


def test_the_operators_say_what_they_do(fla: None) -> None:
    q, k, v, g, beta = inputs()
    given = (q.requires_grad_(), k, v, g, beta, random(B, H, K, V, seed=6), FIRST)
    for name in ("test_schema", "test_autograd_registration", "test_faketensor"):
        torch.library.opcheck(forward_operator, given, test_utils=name)
