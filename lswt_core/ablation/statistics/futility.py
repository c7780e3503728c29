"""Whether more seeds are worth their cost: conditional power at a later look (Lan, Simon & Halperin
1982), normal noise with the standard deviation seen so far.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from scipy import special


class Interim(NamedTuple):
    """The paired differences so far, and the look at which a study is to end."""

    delta: float  # their mean
    std: float
    pairs: int
    last: int  # pairs at the last look

    def error(self, level: float, sides: int) -> float:
        """Return the distance from 0 at which the mean is significant at the last look."""
        critical = -float(special.stdtrit(self.last - 1, level / sides))
        return critical * self.std / math.sqrt(self.last)

    def below(self, bound: float, truth: float) -> float:
        """Return the probability that the last mean is below a bound, at a true difference."""
        rest = self.last - self.pairs
        expected = (self.pairs * self.delta + rest * truth) / self.last
        deviation = self.std * math.sqrt(rest) / self.last
        if deviation == 0.0:
            return float(expected < bound)
        return float(special.ndtr((bound - expected) / deviation))


def resolved_chance(interim: Interim, truth: float, level: float) -> float:
    """Return the probability that a two-sided test of ``level`` at the last look is significant, at
    a true difference.
    """
    if level == 0.0:
        return 0.0
    error = interim.error(level, sides=2)
    return 1 - interim.below(error, truth) + interim.below(-error, truth)


def equivalent_chance(interim: Interim, margin: float, level: float) -> float:
    """Return the probability that TOST of ``level`` at the last look finds equivalence, if the arms
    do not differ.
    """
    if level == 0.0:
        return 0.0
    room = margin - interim.error(level, sides=1)
    return max(0.0, interim.below(room, 0.0) - interim.below(-room, 0.0))
