"""Keys and values that need no gradient, as a memory's, get none: a backward pass by queries alone,
and its Triton kernel, interpreted where there is no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import flash_parts
import pytest
import torch
from helpers import distance, slow_unless
from lswt_sdpa.kernels import CpuFlash, EachQueryOfGroup
from torch import Tensor

from lswt_core.interfaces import AttentionRequirements, KVBlock, SoftCap
from lswt_core.plugin_api import query_gradient
from lswt_core.plugin_api.attention import reference_attention, softmax_scale
from lswt_core.plugin_api.attention_merge import (
    BackwardInputs,
    Gradients,
    Kernel,
    find_fault,
    first_verified,
    merged_attention,
)
from lswt_core.plugin_api.query_gradient import QueryGradient
from lswt_core.plugin_api.short_blocks import SHORT, ShortBlocks

KERNEL = "lswt_core.plugin_api.query_gradient_kernel"
NEED = AttentionRequirements("cpu", torch.float32, 32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter of triton 3.6 fails on arrays of NumPy 2.4; it runs from 3.9 on
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or tuple(map(int, version("triton").split(".")[:2])) < (3, 9),
    reason="triton 3.9 is not installed",
)


class Noted(CpuFlash):
    """Notes which backward pass it is asked for, of how many keys, and by which."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def backward(self, inputs: BackwardInputs) -> Gradients:
        self.asked.append(("all", inputs.k.shape[1]))
        return super().backward(inputs)

    def query_gradient(self, inputs: BackwardInputs) -> Tensor:
        self.asked.append(("queries", inputs.k.shape[1]))
        return super().backward(inputs)[0]


OLD, HALF_OLD, SHORT_OLD, OWN = SHORT + 5, SHORT + 7, 6, SHORT + 1  # keys


def blocks_of_all_kinds(shared: int) -> tuple[list[KVBlock], list[Tensor]]:
    """Memories that need no gradient, one of which only the values do, and a segment's own keys;
    and what does need one.
    """

    def draw(size: int, heads: int = 2) -> Tensor:
        return torch.randn(2, size, heads, 8, dtype=torch.float64)

    q, k, v, half = draw(OWN, 2 * shared), draw(OWN), draw(OWN), draw(HALF_OLD)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, half)]
    old = [KVBlock(q, draw(size), draw(size), causal=False) for size in (OLD, SHORT_OLD)]
    return [*old, KVBlock(q, draw(HALF_OLD), half, False), KVBlock(q, k, v, True)], leaves


@pytest.mark.parametrize(
    ("wrap", "shared", "left_out"),
    [
        (lambda kernel: kernel, 1, ()),
        (ShortBlocks, 1, (SHORT_OLD,)),
        (EachQueryOfGroup, 1, ()),
        (lambda kernel: ShortBlocks(EachQueryOfGroup(kernel)), 3, (SHORT_OLD,)),
    ],
    ids=["kernel", "short blocks", "groups of one", "groups"],
)
def test_keys_that_need_no_gradient_are_passed_by(
    wrap: Callable[[Kernel], Kernel], shared: int, left_out: tuple[int, ...]
) -> None:
    blocks, leaves = blocks_of_all_kinds(shared)
    kernel = Noted()
    outs = merged_attention(wrap(kernel), blocks), reference_attention(blocks)
    found, expected = (torch.autograd.grad(out.square().sum(), leaves) for out in outs)
    assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) < 1e-12
    asked = {("queries", OLD), ("queries", SHORT_OLD), ("all", HALF_OLD), ("all", OWN)}
    assert set(kernel.asked) == {(kind, size) for kind, size in asked if size not in left_out}


def test_a_causal_block_is_left_to_the_kernel() -> None:
    kernel = Noted()
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    blocks = [KVBlock(q.requires_grad_(), k, v, True)]  # frozen projections
    merged_attention(QueryGradient(kernel), blocks).sum().backward()
    assert kernel.asked == [("queries", 5)]


def test_without_triton_the_whole_backward_pass_runs_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    kernels = {"with Triton": QueryGradient(CpuFlash()), "without": CpuFlash()}
    name, faults = first_verified(kernels, NEED)
    assert name == "without" and len(faults) == 1
    assert "with Triton: " in faults[0] and "triton" in faults[0].removeprefix("with Triton")


def test_a_wrong_gradient_of_queries_is_found_by_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_gradient, "differentiate_queries", lambda grad, *_: 0 * grad)
    assert "gradient of queries is off" in str(find_fault(QueryGradient(CpuFlash()), NEED))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 64), (torch.float32, 256)])
def test_what_has_no_tiles_is_refused_with_a_reason(dtype: torch.dtype, width: int) -> None:
    need = NEED._replace(dtype=dtype, d_head=width)
    assert f"not for {width} in {dtype}" in str(find_fault(QueryGradient(CpuFlash()), need))


# ---------- Triton


class Case(NamedTuple):
    """Sizes of attention."""

    own: int  # queries, and keys of their segment
    old: tuple[int, ...]  # keys of every memory
    width: int = 16
    shared: int = 1  # queries per key/value head
    cap: float = 0.0


CASES = {
    "odd lengths": Case(5, (7,)),
    "several tiles": Case(150, (64, 128), width=64),
    "several memories": Case(33, (70, 1, 64), shared=2),
    "capped": Case(33, (70,), cap=1.5, shared=3),
    "a width between powers of two": Case(21, (40,), width=80, shared=2),
}


class Formula(Kernel):
    """The formula, in float64 but for what it returns."""

    def __init__(self, soft_cap: float) -> None:
        self.soft_cap = soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        exact = (tensor.double() for tensor in (q, k, v))
        out, total = flash_parts.forward(*exact, softmax_scale(q), causal, self.soft_cap)
        return out.to(q.dtype), total.float()

    def backward(self, inputs: BackwardInputs) -> Any:
        *tensors, causal = inputs
        exact = [tensor.double() for tensor in tensors]
        scale = softmax_scale(inputs.q)
        return tuple(
            found.to(inputs.q.dtype)
            for found in flash_parts.backward(*exact, scale, causal, self.soft_cap)
        )


def memory_and_segment(case: Case, dtype: torch.dtype) -> tuple[list[KVBlock], Tensor]:
    """Blocks, and their queries. As in a model, values are slices of fused products."""

    def draw(size: int, heads: int) -> Tensor:
        return torch.randn(2, size, heads, case.width).to(DEVICE, dtype)

    q = draw(case.own, 2 * case.shared).requires_grad_()
    cap = SoftCap(case.cap) if case.cap else None
    blocks = [
        KVBlock(q, draw(size, 2), draw(size, 5)[:, :, -2:], causal=size is own, transform=cap)
        for own in [case.own]
        for size in (*case.old, own)
    ]
    return blocks, q


def error_of(case: Case, blocks: list[KVBlock], q: Tensor) -> float:
    """Of the gradient of queries, relative to its norm; that of the output is not dense."""
    out = merged_attention(QueryGradient(Formula(case.cap)), blocks)
    grad = torch.randn(2, case.own, case.width, 2 * case.shared).to(q).mT
    (found,) = torch.autograd.grad(out, q, grad)
    exact = q.detach().double().requires_grad_()
    wide = [one._replace(q=exact, k=one.k.double(), v=one.v.double()) for one in blocks]
    (expected,) = torch.autograd.grad(reference_attention(wide), exact, grad.double())
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter has bfloat16 as integers, and multiplies them as such."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(factor: Any) -> Any:
        if factor.dtype != tl.bfloat16:
            return factor
        bits = factor.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


# Half precision rounds output, gradient of scores and result by half a unit in the last place each.
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}


@needs_triton
@pytest.mark.usefixtures("bfloat16_products")
@pytest.mark.parametrize("dtype", slow_unless([torch.float32, torch.bfloat16], list(DTYPES)))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_gradient_of_attention(case: Case, dtype: torch.dtype) -> None:
    assert error_of(case, *memory_and_segment(case, dtype)) < DTYPES[dtype]


@needs_triton
def test_keys_beyond_the_last_have_no_weight_where_all_scores_are_low() -> None:
    case = CASES["odd lengths"]
    blocks, q = memory_and_segment(case, torch.float32)
    with torch.no_grad():
        q += 6
    low = [one._replace(k=one.k - 6) for one in blocks]  # scores of -144: exp(144) overflows
    assert error_of(case, low, q) < 1e-4  # of scores 1e-5, times keys of 6


@needs_triton
@pytest.mark.parametrize("shared", [1, 3])
def test_the_trial_takes_it(shared: int) -> None:
    need = NEED._replace(device=DEVICE, queries_per_kv=shared)
    assert find_fault(ShortBlocks(QueryGradient(Formula(0.0))), need) is None


@needs_triton
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_blocks_call_it() -> None:
    blocks, q = memory_and_segment(CASES["several memories"], torch.float32)
    attend = partial(merged_attention, QueryGradient(Formula(0.0)))
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    outs = compiled(blocks), attend(blocks)
    found, expected = (torch.autograd.grad(out.square().sum(), q)[0] for out in outs)
    assert found.equal(expected)


# Bytes of shared memory of a block: of the smallest GPUs that run code for 80, and of an H100.
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "shared_memory"), [(80, 99 * 1024), (90, 227 * 1024)])
def test_it_fits_a_gpu(arch: int, shared_memory: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("compile_query_gradient.py")
    settings = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(arch)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found and all(one["SHARED"] <= shared_memory for one in found), found
    assert all(one["STACK"] <= 64 for one in found), found  # 16 registers that do not fit
