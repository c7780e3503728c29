"""Matched budgets: one free size of an arm, chosen so that it costs what the baseline costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import NamedTuple

from lswt_core.ablation.certificate import covers
from lswt_core.errors import UsageError
from lswt_core.recipe import Recipe

KNOBS = {"d_ffn": "model.d_ffn", "n_layers": "model.n_layers"}
# sizes that are multiples of it are fast on every machine; others only where those do not match
ROUND = 8
GOOD = 0.001  # a residual that needs no finer size
ENOUGH = 0.01  # the largest residual that still counts as matched

Rebuild = Callable[[int], Recipe]  # the arm with the knob at a size


class Matched(NamedTuple):
    """A size that was found."""

    key: str
    size: int
    residual: float  # (arm - baseline) / baseline of what is matched

    @property
    def override(self) -> str:
        """The size as a word of the command line."""
        return f"{self.key}={self.size}"


def free_knob(knob: str, axes: Iterable[str], what: str) -> str:
    """The key of a knob; raises UsageError if the arm's swap is about it."""
    key = KNOBS[knob]
    if any(covers(axis, key) or covers(key, axis) for axis in axes):
        others = [name for name in KNOBS if name != knob]
        raise UsageError(
            f"--match {what} cannot turn {key}: the swap is about it\n  fix: --knob {others[0]}, or"
            " --match none"
        )
    return key


def match(name: str, key: str, start: int, target: int, cost: Callable[[int], int]) -> Matched:
    """The size at which an arm's ``cost`` (growing with the size) is nearest to the target; raises
    UsageError if none is near.
    """
    cost = cache(cost)
    size = nearest(cost, target, start, ROUND)
    if size is None or abs(cost(size) - target) > GOOD * target:
        size = nearest(cost, target, size or start, 1)
    residual = None if size is None else (cost(size) - target) / target
    if size is None or residual is None or abs(residual) > ENOUGH:
        best = (
            "no size is small enough"
            if size is None
            else f"the best is {key} = {size}, which is off by {residual:+.2%}"
        )
        raise UsageError(
            f'arm "{name}" cannot be matched to the baseline by {key}: {best}\n  fix: --knob, or'
            " --match none"
        )
    return Matched(key, size, residual)


def nearest(cost: Callable[[int], int], target: int, start: int, step: int) -> int | None:
    """The multiple of ``step`` whose cost is nearest to the target; None if even the smallest costs
    more than double.
    """
    low, high = 1, max(1, round(start / step))
    while cost(high * step) < target:
        low, high = high, high * 2
    while high - low > 1:
        middle = guess(cost(low * step), cost(high * step), target, low, high)
        low, high = (middle, high) if cost(middle * step) < target else (low, middle)
    best = min((low, high), key=lambda count: abs(cost(count * step) - target))
    return best * step if cost(best * step) <= 2 * target else None


def guess(at_low: int, at_high: int, target: int, low: int, high: int) -> int:
    """Where the target lies between two sizes if costs grow evenly; strictly between them."""
    slope = (at_high - at_low) / (high - low)
    return min(
        max(low + round((target - at_low) / slope) if slope else (low + high) // 2, low + 1),
        high - 1,
    )
