"""Time, taken in turn: A-B-A-B, so that what the machine does meanwhile meets everyone alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

Turn = Callable[[], object]  # one measured piece of work
CALLS = 50  # of something short between two waits for a device


class Span(NamedTuple):
    """A median and its range."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Span:
        """Of some values."""
        return cls(median(values), min(values), max(values))


def in_turn(
    turns: Mapping[str, Callable[[], Turn]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every subject's turn, round by round; every second round goes backwards, so that
    none always follows the same one. ``turns`` make each turn ready, what it reads on the device
    included, before its clock starts.
    """
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        order = list(turns) if number % 2 == 0 else list(reversed(list(turns)))
        for name in order:
            taken[name].append(seconds(turns[name](), device))
    return taken


def seconds(turn: Turn, device: torch.device) -> float:
    """How long a piece of work takes, to the end of what it has put on the device."""
    settle(device)
    began = time.perf_counter()
    turn()
    settle(device)
    return time.perf_counter() - began


def seconds_of_one(function: Turn, device: torch.device, calls: int = CALLS) -> float:
    """How long one of ``calls`` calls takes that are put on a device at once: neither waiting for
    it nor the way to it counts, as little as within a step. A CPU has nothing to wait for, and a
    single call is measured there.
    """
    if device.type == "cpu":
        return seconds(function, device)

    def all_of_them() -> None:
        for _ in range(calls):
            function()

    return seconds(all_of_them, device) / calls


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def ratio(taken: Mapping[str, Sequence[float]], name: str, baseline: str) -> Span:
    """How many times as long a subject takes as the one beside it, round by round."""
    return Span.of([a / b for a, b in zip(taken[name], taken[baseline], strict=True)])
