"""Ceilings of this machine (a roofline): matrix products at the model's own shapes, and copies."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from lswt_core.benchmark.interleave import Call, time_per_call
from lswt_core.benchmark.work import Work

REPEATS = 5
COPY_BYTES = 1 << 27  # more than a cache holds


class Ceilings(NamedTuple):
    """Rates measured in the same process as the contenders."""

    block: float  # FLOP/s of a block's matrix products, forward and backward
    head: float  # FLOP/s of the LM head's
    copy: float  # bytes/s read and written


def measure_ceilings(work: Work) -> Ceilings:
    """Measure matrix products of random numbers in the run's precision, and copies."""
    d, ffn = work.d_model, work.d_ffn
    block_layers = [(d, d)] * 4 + [(d, ffn)] * 2 + [(ffn, d)]
    head_layers = [(work.d_vocab, work.vocab_size)]
    source = torch.randint(255, (COPY_BYTES,), dtype=torch.uint8, device=work.device)
    target = torch.empty_like(source)
    return Ceilings(
        measure_linear(work, block_layers, weight_gradients=True),
        measure_linear(work, head_layers, weight_gradients=work.trainable_embedding),
        2 * COPY_BYTES / fastest_seconds(lambda: target.copy_(source), work),
    )


def measure_linear(work: Work, layers: list[tuple[int, int]], *, weight_gradients: bool) -> float:
    """Return the FLOP/s of linear layers [in, out] over a step's tokens: forward, gradient of the
    input and, with ``weight_gradients``, of the weights.
    """
    flops, taken = 0.0, 0.0
    for in_width, out_width in layers:
        x, w, grad = (
            torch.randn(shape, device=work.device).to(work.precision.dtype)
            for shape in (
                (work.tokens, in_width),
                (out_width, in_width),
                (work.tokens, out_width),
            )
        )
        products = [partial(torch.matmul, x, w.T), partial(torch.matmul, grad, w)]
        if weight_gradients:
            products.append(partial(torch.matmul, grad.T, x))
        taken += sum(fastest_seconds(product, work) for product in products)
        flops += 2.0 * work.tokens * in_width * out_width * len(products)
    return flops / taken


def fastest_seconds(function: Call, work: Work) -> float:
    """Return the seconds of a call in the fastest of REPEATS measurements, after a warm-up."""
    function()
    return min(time_per_call(function, work.device) for _ in range(REPEATS))
