"""Checks of attention backends on a device: outputs and gradients against attention in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.acceptance.item import Unmet
from lswt_core.device import pick_device
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Dims,
    KVBlock,
    SlopeBias,
    SoftCap,
    Unsupported,
)
from lswt_core.plugin_api.attention import reference_attention
from lswt_core.registry import Registry

# A kernel may round twice as much as plain attention in the same dtype (merging the outputs of
# blocks rounds each once more), and a few units in the last place where that is nearly exact.
FACTOR, UNITS = 2.0, 2.0
CAP = 5.0  # scores of random queries and keys are about as large

Inputs = Mapping[str, Tensor]


class Shape(NamedTuple):
    """Sizes of a layer's attention."""

    rows: int
    new: int  # tokens of the segment, T
    old: int  # remembered keys
    sinks: int  # registers
    heads: int
    width: int  # of a head


class Case(NamedTuple):
    """What a layer asks of a backend."""

    name: str
    memory: bool = False
    remembered: bool = False  # the memory needs no gradient, as in training
    registers: bool = False
    window: bool = False
    slopes: bool = False
    queries_per_kv: int = 1
    cap: SoftCap | None = None


CASES = (
    Case("causal"),
    Case("causal + memory", memory=True),
    Case("causal + memory + registers", memory=True, registers=True),
    Case("grouped heads", memory=True, registers=True, queries_per_kv=2),
    Case("remembered", memory=True, registers=True, queries_per_kv=2, remembered=True),
    Case("window", memory=True, registers=True, window=True),
    Case("alibi", memory=True, slopes=True),
    Case("soft cap", memory=True, cap=SoftCap(CAP)),
)
SHAPES = {  # that of a model's layer where the device is made for it
    "cpu": Shape(2, 32, 48, 4, 4, 16),
    "cuda": Shape(2, 2048, 2048, 16, 4, 64),
}


def check_backend(backend: str, dtype: str) -> dict[str, Any]:
    """Compare a backend in every case that it does not refuse; returns errors by case, relative to
    the norm, with what is allowed. Raises Unmet with all cases beyond that.
    """
    device = pick_device(0)
    shape = SHAPES.get(device.type, SHAPES["cuda"])
    compared: dict[str, Any] = {}
    shares: list[float] = []
    refused: dict[str, str] = {}
    wrong: list[str] = []
    for case in CASES:
        try:
            attend, note = build_backend(backend, case, shape, device, getattr(torch, dtype))
        except Unsupported as reason:
            refused[case.name] = str(reason).partition("\n")[0]
            continue
        found = compare(attend, case, shape, device, getattr(torch, dtype))
        compared[case.name] = {"note": note, **{name: list(pair) for name, pair in found.items()}}
        shares.append(largest_share(found))
        wrong += [f"{case.name}: {text}" for text in beyond(found)]
    if wrong:
        raise Unmet("; ".join(wrong))
    if not compared:
        raise SkipTest(f"it refuses every case: {next(iter(refused.values()))}")
    return {"of_allowed": max(shares), "cases": compared, "refused": refused}


def build_backend(
    name: str, case: Case, shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[AttentionBackend, str | None]:
    """A backend and what it says about its kernel. Raises Unsupported if it refuses the case."""
    need = AttentionRequirements(
        device.type,
        dtype,
        shape.width,
        has_bias=case.slopes,
        has_mask=case.window,
        queries_per_kv=case.queries_per_kv,
        transform=type(case.cap) if case.cap else None,
    )
    width = shape.heads * shape.width
    dims = Dims(width, shape.heads, 4 * width, 1, queries_per_kv=case.queries_per_kv)
    backend: AttentionBackend = Registry().get("attention", name)(dims)
    return backend, backend.require(need)


def compare(
    attend: AttentionBackend, case: Case, shape: Shape, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """The error of the output and of every gradient, and what is allowed."""
    inputs = {name: tensor.to(device, dtype) for name, tensor in make_inputs(case, shape).items()}
    exact = run(reference_attention, {k: v.double() for k, v in inputs.items()}, case)
    plain, found = (run(one, inputs, case) for one in (reference_attention, attend))
    units = UNITS * torch.finfo(dtype).eps
    return {
        name: (
            relative_error(found[name], exact[name]),
            FACTOR * relative_error(plain[name], exact[name]) + units,
        )
        for name in exact
    }


def beyond(found: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    """The errors that are larger than allowed, or no number."""
    for name, (error, allowed) in found.items():
        if not error <= allowed:
            yield f"{name} is off by {error:.2g} of its norm, allowed is {allowed:.2g}"


def largest_share(found: Mapping[str, tuple[float, float]]) -> float:
    """The largest error as a share of what is allowed."""
    return max(error / allowed for error, allowed in found.values())


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The norm of the difference to ``exact``, relative to its norm."""
    return float((value.double() - exact).norm() / exact.norm())


def make_inputs(case: Case, shape: Shape) -> dict[str, Tensor]:
    """The tensors that blocks are made of, in float64. As in a model, queries, keys and values of a
    segment are one product, and all rows share the registers.
    """
    rows, new, old, sinks, heads, width = shape
    groups = heads // case.queries_per_kv
    sizes = {"fused": (rows, new, heads + 2 * groups, width), "sink_q": (rows, new, heads, width)}
    for name, length, count in (("old", old, rows), ("sink", sinks, 1)):
        sizes |= {f"{name}_{part}": (count, length, groups, width) for part in "kv"}
    generator = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(size, generator=generator, dtype=torch.float64)
        for name, size in sizes.items()
    }
    unused = ("" if case.memory else "old", "" if case.registers else "sink")
    return {name: one for name, one in made.items() if name.partition("_")[0] not in unused}


def run(attend: Any, inputs: Inputs, case: Case) -> dict[str, Tensor]:
    """The output, and the gradient of every input that needs one."""
    frozen = {"old_k", "old_v"} if case.remembered else set()
    leaves = {
        name: tensor.clone().requires_grad_()
        for name, tensor in inputs.items()
        if name not in frozen
    }
    out = attend(make_blocks({**inputs, **leaves}, case))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    gradients = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
    return {"output": out.detach()} | {
        f"gradient of {name}": one for name, one in zip(leaves, gradients, strict=True)
    }


def make_blocks(inputs: Inputs, case: Case) -> list[KVBlock]:
    """Key/value blocks of registers, memory and the new segment."""
    fused = inputs["fused"]
    groups = fused.shape[2] // (case.queries_per_kv + 2)
    q, k, v = fused.split([groups * case.queries_per_kv, groups, groups], dim=2)
    size, device = q.shape[1], q.device
    new = KVBlock(q, k, v, True, positions=torch.arange(size, device=device))
    blocks = [new]
    if case.memory:
        old_k, old_v = inputs["old_k"], inputs["old_v"]
        positions = torch.arange(-old_k.shape[1], 0, device=device)
        blocks.insert(0, KVBlock(q, old_k, old_v, False, positions=positions))
    if case.window:
        first = torch.arange(size, device=device)[None] - size // 2
        blocks = [block._replace(first_visible=first) for block in blocks]
    if case.slopes:
        blocks = [block._replace(bias=slopes_of(block)) for block in blocks]
    if case.registers:
        sink_k, sink_v = (inputs[name].expand(len(q), -1, -1, -1) for name in ("sink_k", "sink_v"))
        blocks.insert(0, KVBlock(inputs["sink_q"], sink_k, sink_v, causal=False))
    return [block._replace(transform=case.cap) for block in blocks]


def slopes_of(block: KVBlock) -> SlopeBias:
    """ALiBi's bias of a block."""
    heads, size, device = block.q.shape[2], block.q.shape[1], block.q.device
    dtype = torch.promote_types(block.q.dtype, torch.float32)  # distances are exact in it
    slopes = 2.0 ** -torch.arange(1, heads + 1, device=device).to(dtype)
    assert block.positions is not None
    return SlopeBias(slopes, torch.arange(size, device=device), block.positions)
