"""Matched budgets: one size of an arm, chosen so that the arm has the baseline's parameters or
FLOPs (or its number of steps, so that it takes the same time: ``match_time``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

from lswt_core.ablation.recipe_diff import covers
from lswt_core.errors import UsageError

KNOBS = {"d_ffn": "model.d_ffn", "n_layers": "model.n_layers"}
# Sizes are multiples of this, which is fast on every machine, unless only others match.
MULTIPLE = 8
GOOD_RESIDUAL = 0.001  # needs no finer size
MAX_RESIDUAL = 0.01  # still counts as matched


class Matched(NamedTuple):
    """A size that matches an arm's cost to the baseline's."""

    key: str
    size: int
    residual: float  # (arm - baseline) / baseline
    measured: dict[str, Any] | None = None  # of --match time: see match_time.describe_times

    @property
    def override(self) -> str:
        """The size as an override of the recipe."""
        return f"{self.key}={self.size}"


def choose_knob(knob: str, axes: Iterable[str], what: str) -> str:
    """Return the key of a knob; raises UsageError if the arm's swap is about it."""
    key = KNOBS[knob]
    if any(covers(axis, key) or covers(key, axis) for axis in axes):
        other = next(name for name in KNOBS if name != knob)
        raise UsageError(
            f"--match {what} cannot change {key}: the swap is about it\n"
            f"  fix: --knob {other}, or --match none"
        )
    return key


def match_size(arm: str, key: str, start: int, target: int, cost: Callable[[int], int]) -> Matched:
    """Return the size at which an arm's ``cost``, which grows with the size, is nearest to the
    target.

    The search begins at ``start``. Raises UsageError if no size is within MAX_RESIDUAL.
    """
    cost = cache(cost)
    size = find_nearest(cost, target, start, MULTIPLE)
    if size is None or abs(cost(size) - target) > GOOD_RESIDUAL * target:
        size = find_nearest(cost, target, size or start, 1)
    if size is None:
        raise unmatched(arm, key, "no size is small enough")
    residual = (cost(size) - target) / target
    if abs(residual) > MAX_RESIDUAL:
        raise unmatched(arm, key, f"the best is {key} = {size}, which is off by {residual:+.2%}")
    return Matched(key, size, residual)


def unmatched(arm: str, key: str, why: str) -> UsageError:
    """Return the error of an arm that cannot be matched."""
    return UsageError(
        f'arm "{arm}" cannot be matched to the baseline by {key}: {why}\n'
        "  fix: --knob, or --match none"
    )


def find_nearest(cost: Callable[[int], int], target: int, start: int, step: int) -> int | None:
    """Return the multiple of ``step`` whose cost is nearest to the target, by bisection; None if
    even the smallest costs more than twice the target.
    """
    low, high = 1, max(1, round(start / step))
    while cost(high * step) < target:
        low, high = high, high * 2
    while high - low > 1:
        middle = interpolate(cost(low * step), cost(high * step), target, low, high)
        if cost(middle * step) < target:
            low = middle
        else:
            high = middle
    best = min((low, high), key=lambda count: abs(cost(count * step) - target))
    if cost(best * step) > 2 * target:
        return None
    return best * step


def interpolate(cost_low: int, cost_high: int, target: int, low: int, high: int) -> int:
    """Return where the target lies if the cost is linear, strictly between ``low`` and ``high``."""
    slope = (cost_high - cost_low) / (high - low)
    guess = low + round((target - cost_low) / slope) if slope else (low + high) // 2
    return min(max(guess, low + 1), high - 1)
