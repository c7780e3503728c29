"""Effective speedup: how much of the baseline's compute an arm's difference in loss is worth, at
every size of a ladder, its trend over sizes, and what both say about the next size. Pure functions
of arrays.

Two curves are side by side in all arrays with a dimension of arms: the baseline's, the arm's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lswt_core.ablation.statistics.scaling_fit import Law

Floats = NDArray[np.float64]


class Trend(NamedTuple):
    """A straight line of the gain (log) over log10 of the baseline's training FLOPs."""

    slope: Floats  # [...] per tenfold compute
    level: Floats  # [...] at ``centre``
    centre: float

    def at(self, flops: float) -> Floats:
        """Return the line's value [...] at some training FLOPs of the baseline."""
        with np.errstate(invalid="ignore"):  # of unbounded gains
            value: Floats = self.level + self.slope * (np.log10(flops) - self.centre)
        return value


def log_gain(losses: Floats, law: Law) -> Floats:
    """Return ln(((L_b - L_inf) / (L_v - L_inf))^(1 / alpha)) [..., rungs] of losses
    [..., 2, rungs]: the factor of compute with which the baseline would have the arm's loss, before
    what the arm itself costs. Positive: the arm is better.

    It is infinite where the arm is below L_inf (no compute would do), minus infinite where the
    baseline is, NaN where both are or there is no law.
    """
    excess = losses - law.l_inf[..., None, None]
    logs = np.where(excess > 0, np.log(np.where(excess > 0, excess, 1.0)), -np.inf)
    with np.errstate(invalid="ignore"):
        gain: Floats = (logs[..., 0, :] - logs[..., 1, :]) / law.alpha[..., None]
    return np.where(np.isnan(law.l_inf)[..., None], np.nan, gain)


def fit_trend(gain: Floats, flops: Floats) -> Trend:
    """Return the least-squares line of gains [..., rungs] over the baseline's FLOPs [rungs].

    Under a law with an exponent of its own for each arm, the slope per e-fold of compute is
    alpha_v / alpha_b - 1: a line without slope is the model of ``scaling_fit``.
    """
    at = np.log10(flops)
    centred = at - at.mean()
    with np.errstate(invalid="ignore"):
        slope: Floats = (gain * (centred / (centred @ centred))).sum(-1)
        level: Floats = gain.mean(-1)
    return Trend(slope, level, float(at.mean()))


def predict_pair(law: Law, trend: Trend, flops: float) -> tuple[Floats, Floats]:
    """Return the baseline's loss [...] at a size, and the arm's difference [...] to it: the line's
    gain, turned back into nats.
    """
    both = np.full((law.a.shape[-1], 1), flops)
    baseline = law.predict(both)[..., 0, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.exp(-law.alpha * trend.at(flops))
        difference: Floats = (baseline - law.l_inf) * (ratio - 1)
    return baseline, difference


def next_flops(flops: Floats) -> float:
    """Return the training FLOPs of one rung beyond the last, as far from it as that is from the
    one before.
    """
    return float(flops[-1] * flops[-1] / flops[-2])
