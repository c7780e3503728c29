"""What one step does besides taking time: bytes, waits of the host, compiled graphs. Looked at in a
step of its own, which is not timed.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class Seen(NamedTuple):
    """What was seen."""

    peak: int  # bytes at most allocated during the step, above what was there before
    waits: int | None  # times the host waited for the device; None where the two are one


class Graphs(NamedTuple):
    """What torch.compile has done so far."""

    graphs: int
    breaks: int

    @classmethod
    def now(cls) -> Graphs:
        """Counted by torch."""
        from torch._dynamo.utils import counters

        return cls(counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values()))


def look(step: Callable[[], object], device: torch.device) -> Seen:
    """Run a step under observation."""
    return look_at_gpu(step, device) if device.type == "cuda" else look_at_cpu(step)


def look_at_cpu(step: Callable[[], object]) -> Seen:
    """By the profiler, which sees every allocation of torch's."""
    with silenced(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    level = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return Seen(peak, None)


@contextmanager
def silenced() -> Iterator[None]:
    """Without what the profiler's libraries say of themselves, which goes past Python to the
    standard error.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123  (no file of anyone's)
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def look_at_gpu(step: Callable[[], object], device: torch.device) -> Seen:
    """By CUDA's own counters."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(device)
    return Seen(
        torch.cuda.max_memory_allocated(device) - before,
        sum("synchroniz" in str(one.message) for one in told),
    )


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of different storages."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )
