"""What the machine could do at best: matrix products at the model's own shapes, and copies."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from lswt_core.benchmark.interleave import Turn, seconds_of_one
from lswt_core.benchmark.work import Work

REPEATS = 5
COPIED = 1 << 27  # bytes: more than a cache holds


class Ceilings(NamedTuple):
    """Rates measured in the same run."""

    block: float  # FLOP/s of a block's matrix products, forward and backward
    head: float  # FLOP/s of the vocabulary's
    copy: float  # bytes/s read and written


def measure(work: Work) -> Ceilings:
    """Matrix products of random numbers in the run's precision."""
    d, ffn = work.d_model, work.d_ffn
    block = [(d, d)] * 4 + [(d, ffn)] * 2 + [(ffn, d)]
    source = torch.randint(255, (COPIED,), dtype=torch.uint8, device=work.device)
    target = torch.empty_like(source)
    return Ceilings(
        rate(work, block, weights=True),
        rate(work, [(work.d_vocab, work.vocab_size)], weights=work.trained_table),
        2 * COPIED / fastest(lambda: target.copy_(source), work),
    )


def rate(work: Work, layers: list[tuple[int, int]], *, weights: bool) -> float:
    """FLOP/s of linear layers [in, out] over a step's tokens: forward, gradient of the input and,
    if asked, of the weights.
    """
    flops, taken = 0.0, 0.0
    for wide, out in layers:
        x, w, g = (
            torch.randn(shape, device=work.device).to(work.precision.dtype)
            for shape in ((work.tokens, wide), (out, wide), (work.tokens, out))
        )
        taken += fastest(partial(torch.matmul, x, w.T), work) + fastest(
            partial(torch.matmul, g, w), work
        )
        taken += fastest(partial(torch.matmul, g.T, x), work) if weights else 0.0
        flops += 2.0 * work.tokens * wide * out * (3 if weights else 2)
    return flops / taken


def fastest(function: Turn, work: Work) -> float:
    """Seconds of a call in the best of some measurements: a ceiling is what could be."""
    function()
    return min(seconds_of_one(function, work.device) for _ in range(REPEATS))
