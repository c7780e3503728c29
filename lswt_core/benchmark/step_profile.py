"""Peak memory, host synchronisations and compiled graphs of one step, which is not timed."""

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


class StepProfile(NamedTuple):
    """Costs of one step besides time."""

    peak_bytes: int  # largest allocation during the step, above what was allocated before
    syncs: int | None  # host synchronisations with the device; None on a CPU


class CompileCounts(NamedTuple):
    """Graphs and graph breaks of torch.compile so far."""

    graphs: int
    breaks: int

    @classmethod
    def now(cls) -> CompileCounts:
        """Read torch's counters."""
        from torch._dynamo.utils import counters

        return cls(counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values()))


def profile_step(step: Callable[[], object], device: torch.device) -> StepProfile:
    """Run a step and return its costs."""
    return profile_on_cuda(step, device) if device.type == "cuda" else profile_on_cpu(step)


def profile_on_cpu(step: Callable[[], object]) -> StepProfile:
    """Use torch's profiler, which records every allocation."""
    # accumulating: torch 2.10 warns of a profiler that does not
    cpu = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with silent_stderr(), cpu as trace:
        step()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    allocated = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return StepProfile(peak, None)


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Discard standard error, to which the profiler's libraries write past Python."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123  (no file of anyone's)
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def profile_on_cuda(step: Callable[[], object], device: torch.device) -> StepProfile:
    """Use CUDA's memory statistics and its warnings on synchronisation."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return StepProfile(peak, sum("synchroniz" in str(warning.message) for warning in caught))


def storage_bytes(tensors: list[Tensor]) -> int:
    """Return the bytes of all storages, shared ones once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
