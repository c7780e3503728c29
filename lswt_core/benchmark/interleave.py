"""Interleaved timing (A-B-B-A rounds), so that changes of the machine affect all contenders
alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

Call = Callable[[], object]  # the work that is timed
CALLS = 50  # of something short, between two synchronisations


class Spread(NamedTuple):
    """Median and range."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values."""
        return cls(median(values), min(values), max(values))


def time_interleaved(
    prepare: Mapping[str, Callable[[], Call]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return seconds by contender and round; every second round runs in reverse order, so that none
    always follows the same one. ``prepare`` returns the work to time, with its inputs already on
    the device.
    """
    taken: dict[str, list[float]] = {name: [] for name in prepare}
    for number in range(rounds):
        order = list(prepare)
        if number % 2:
            order.reverse()
        for name in order:
            taken[name].append(time_call(prepare[name](), device))
    return taken


def time_call(call: Call, device: torch.device) -> float:
    """Return the seconds of a call, until the device has finished."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def time_per_call(function: Call, device: torch.device, calls: int = CALLS) -> float:
    """Return the seconds per call of ``calls`` calls launched together: as within a step, neither
    launch nor synchronisation counts. On a CPU a single call is timed.
    """
    if device.type == "cpu":
        return time_call(function, device)

    def all_calls() -> None:
        for _ in range(calls):
            function()

    return time_call(all_calls, device) / calls


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_ratio(taken: Mapping[str, Sequence[float]], name: str, baseline: str) -> Spread:
    """Return the time of a contender relative to its baseline, round by round."""
    return Spread.of([a / b for a, b in zip(taken[name], taken[baseline], strict=True)])
