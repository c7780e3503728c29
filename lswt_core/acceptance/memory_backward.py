"""Time of the backward pass of a remembered block: towards the queries alone, and the whole one."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.acceptance.attention import Case, Shape, build_backend
from lswt_core.benchmark.interleave import CALLS, Call, time_interleaved, time_ratio
from lswt_core.device import pick_device
from lswt_core.interfaces import AttentionBackend, KVBlock, Unsupported

# Of a layer; on CUDA of Tiny, with so many rows that launching kernels takes no share.
SHAPES = {"cpu": Shape(2, 32, 48, 0, 4, 16), "cuda": Shape(16, 2048, 2048, 0, 12, 64)}
ALONE, WHOLE = "queries alone", "whole"
WARM_UP, ROUNDS = 2, 10


def time_memory_backward(backend: str, dtype: str) -> dict[str, Any]:
    """Time the backward pass of attention to keys and values that need no gradient, and to the same
    that do, in interleaved pairs. Returns the "ratio" of the two with its "spread" over pairs,
    milliseconds, and which kernel ran. Raises SkipTest if the backend does not run here.
    """
    device = pick_device(0)
    shape = SHAPES.get(device.type, SHAPES["cuda"])
    try:
        attend, kernel = build_backend(
            backend, Case("remembered"), shape, device, getattr(torch, dtype)
        )
    except Unsupported as reason:
        raise SkipTest(str(reason)) from reason
    inputs = make_inputs(shape, device, getattr(torch, dtype))
    calls = 1 if device.type == "cpu" else CALLS
    prepare = {
        name: partial(prepare_backward, attend, inputs, needs_kv, calls)
        for name, needs_kv in ((ALONE, False), (WHOLE, True))
    }
    time_interleaved(prepare, WARM_UP, device)
    taken = time_interleaved(prepare, ROUNDS, device)
    ratio = time_ratio(taken, ALONE, WHOLE)
    return {
        "ratio": ratio.median,
        "aim": None,
        "spread": ratio._asdict(),
        "kernel": kernel,
        "milliseconds": {name: [1e3 * each / calls for each in taken[name]] for name in taken},
    }


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, [B, N, H, D]."""
    generator = torch.Generator(device).manual_seed(0)
    lengths = (shape.new, shape.old, shape.old, shape.new)
    sizes = [(shape.rows, length, shape.heads, shape.width) for length in lengths]
    return [torch.randn(size, dtype=dtype, device=device, generator=generator) for size in sizes]


def prepare_backward(
    attend: AttentionBackend, inputs: list[Tensor], needs_kv: bool, calls: int
) -> Call:
    """The forward pass, done, and ``calls`` times its backward pass, to be timed."""
    *tensors, grad = inputs
    q, k, v = (tensor.detach() for tensor in tensors)
    leaves = [q, k, v] if needs_kv else [q]
    for leaf in leaves:
        leaf.requires_grad_()
    out = attend([KVBlock(q, k, v, causal=False)])

    def backward() -> None:
        for _ in range(calls):
            torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return backward
