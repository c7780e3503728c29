"""Options that are tuned, and their grids. Imports no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

from lswt_core.errors import UsageError

FACTOR = 2.0  # between neighbouring points of a grid, unless said otherwise
FEWEST_POINTS = 3  # or no optimum could lie inside of the grid
DIGITS = 4  # of a point
FORM = "--tune KEY=POINTS, KEY=POINTSxFACTOR or KEY=LOW..HIGH/POINTS, e.g. optimizer.lr=5"


class TunedOption(NamedTuple):
    """A real-valued recipe key, and how its grid is made."""

    key: str
    points: int
    factor: float  # between neighbouring points
    low: float | None = None  # of a given range; None: the grid is around each arm's own value

    def grid(self, own: float) -> tuple[float, ...]:
        """Return the points, ascending, for an arm whose recipe has the value ``own``, which is
        one of them unless a range was given.
        """
        first = -(self.points // 2)
        start, powers = own, range(first, first + self.points)
        if self.low is not None:
            start, powers = self.low, range(self.points)
        return tuple(start if not i else shift(start, self.factor, i) for i in powers)


def shift(value: float, factor: float, steps: float) -> float:
    """Return value * factor**steps, to DIGITS digits: it is written into recipes."""
    return float(f"{value * factor**steps:.{DIGITS}g}")


def parse_tune(text: str) -> TunedOption:
    """Return the option of a --tune word; raises UsageError."""
    key, equals, rest = text.rpartition("=")
    span, slash, points = rest.rpartition("/")
    low, dots, high = span.partition("..")
    points, times, factor = points.partition("x")
    is_range = bool(slash and low and high and not times)
    if not equals or not key or is_range != bool(slash or dots):
        raise UsageError(f"--tune {text}: it does not read KEY=POINTS\n  fix: {FORM}")
    try:
        count = int(points)
        numbers = [float(one) for one in (low, high, factor) if one]
    except ValueError as error:
        raise UsageError(f"--tune {text}: {error}\n  fix: {FORM}") from error
    if count < FEWEST_POINTS or not all(0 < one < math.inf for one in numbers):
        raise UsageError(
            f"--tune {text}: a grid has at least {FEWEST_POINTS} points, all positive: it is"
            f" logarithmic\n  fix: {FORM}"
        )
    if not is_range:
        return around(text, key, count, numbers[0] if numbers else FACTOR)
    first, last = numbers
    return around(text, key, count, (last / first) ** (1 / (count - 1)), first)


def around(
    text: str, key: str, points: int, factor: float, low: float | None = None
) -> TunedOption:
    """Return an option whose points ascend; raises UsageError if they would not."""
    if factor <= 1:
        raise UsageError(f"--tune {text}: the points of a grid ascend\n  fix: {FORM}")
    return TunedOption(key, points, factor, low)
