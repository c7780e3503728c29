"""What a difference in loss is worth in compute, read from the baseline's losses at several lengths
of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def worth_of_compute(
    delta: float, cost: float, lengths: Sequence[tuple[float, float]]
) -> float | None:
    """Return the factor of compute with which the baseline would have the loss of an arm, over that
    of the arm; None where no measured length has that loss.

    ``lengths``: multiple of the recipe's steps (ascending, 1 among them) and the baseline's loss.
    ``cost``: the arm's training FLOPs over the baseline's. Between two lengths, loss is linear in
    the logarithm of compute; every length ends with the whole schedule.
    """
    own = dict(lengths).get(1.0)
    if own is None or cost <= 0:
        return None
    target = own + delta
    for (low, before), (high, after) in pairwise(lengths):
        if before > after and after <= target <= before:
            share = (before - target) / (before - after)
            return math.exp(math.log(low) + share * math.log(high / low)) / cost
    return None
