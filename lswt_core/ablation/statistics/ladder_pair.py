"""An arm beside the baseline on a ladder of sizes: the law of both, what the arm is worth in
compute, its trend, the next size, and a back-test. Pure functions of arrays.

Whatever is estimated is computed once for the means over seeds and for draws of them
(``seed_draws``): the interval of every number comes from the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lswt_core.ablation.statistics.paired_runs import paired_test
from lswt_core.ablation.statistics.scaling_fit import FREE_RUNGS, Law, fit_law
from lswt_core.ablation.statistics.seed_draws import draw_means, interval, two_sided_p
from lswt_core.ablation.statistics.speedup import (
    Trend,
    fit_trend,
    log_gain,
    next_flops,
    predict_pair,
)

Floats = NDArray[np.float64]
# of the lowest loss: what L_inf is taken for where sizes are too few to fit it, the middle first
L_INF_SHARES = (0.5, 0.0, 0.9)


class Pair(NamedTuple):
    """Baseline and arm at every size, at the seeds at which both finished at all sizes."""

    losses: Floats  # [seeds, 2, rungs] held-out loss, nats per token
    flops: Floats  # [2, rungs] training FLOPs of a run
    speeds: Floats  # [seeds, rungs] ln of the arm's tokens/s over the baseline's; NaN: unknown

    def without_top(self) -> Pair:
        """Return the pair without the largest size."""
        return Pair(self.losses[..., :-1], self.flops[:, :-1], self.speeds[:, :-1])


class Estimates(NamedTuple):
    """Means over seeds (index 0) and draws of them, and what follows from each."""

    losses: Floats  # [1 + draws, 2, rungs]
    speeds: Floats  # [1 + draws, rungs]
    law: Law
    gain: Floats  # [1 + draws, rungs] ln of the compute that the arm saves at equal cost
    trend: Trend


def estimate(pair: Pair, l_inf: float | None = None) -> Estimates:
    """Return all estimates; one seed has no draws. ``l_inf`` None: it is fitted."""
    values = np.concatenate([pair.losses, pair.speeds[:, None]], axis=1)  # [seeds, 3, rungs]
    means = values.mean(0)[None]
    if len(values) > 1:
        means = np.concatenate([means, draw_means(values)])
    losses, speeds = means[:, :2], means[:, 2]
    law = fit_law(losses, pair.flops, l_inf)
    gain = log_gain(losses, law)
    return Estimates(losses, speeds, law, gain, fit_trend(gain, pair.flops[0]))


def analyse_pair(pair: Pair) -> dict[str, Any]:
    """Return what ``report.ladder_report`` says of an arm, as plain data. {value, ci95} is a number
    and its 95 % interval; a value of None is not finite, an end of None unbounded, an interval of
    None unknown.

    "law": l_inf, alpha, a (of baseline and arm), reference_flops, l_inf_fixed (None: fitted).
    "speedup", factors of compute: compute (at the largest size, by FLOPs), time (by tokens/s),
    by_rung, if_l_inf (compute, for values that L_inf might have), cost (FLOPs over the baseline's,
    which both have in them). "trend": factor_per_decade (of
    the gain, per tenfold compute), p, gain_at (smallest and largest size, the line's), gain_next;
    nats {slope per tenfold compute, ci95, p, line_at (smallest and largest size)}. "next": flops,
    baseline, difference, speedup. "back_test": see ``back_test``; None where sizes are too few.
    """
    fixed = None if pair.flops.shape[1] >= FREE_RUNGS else possible_l_inf(pair)[0]
    found = estimate(pair, fixed)
    return {
        "seeds": len(pair.losses),
        "law": describe_law(found.law, fixed),
        "speedup": describe_speedup(pair, found),
        "trend": describe_trend(pair, found),
        "next": describe_next(pair, found),
        "back_test": back_test(pair),
    }


def possible_l_inf(pair: Pair) -> list[float]:
    """Return values that L_inf might have, the middle one first."""
    lowest = float(pair.losses.mean(0).min())
    return [share * lowest for share in L_INF_SHARES]


def measured(values: Floats) -> dict[str, Any]:
    """Return a number, at index 0, and its interval, from the draws behind it."""
    found = None if len(values) < 2 else interval(values[1:])
    ends = None if found is None else [finite(found[0]), finite(found[1])]
    return {"value": finite(float(values[0])), "ci95": ends}


def finite(value: float) -> float | None:
    """Return a number; None if it is not finite."""
    return value if math.isfinite(value) else None


def describe_law(law: Law, fixed: float | None) -> dict[str, Any]:
    """Return the law of both arms."""
    return {
        "l_inf": measured(law.l_inf),
        "alpha": measured(law.alpha),
        "a": [measured(law.a[:, 0]), measured(law.a[:, 1])],
        "reference_flops": law.reference_flops,
        "l_inf_fixed": fixed,
    }


def describe_speedup(pair: Pair, found: Estimates) -> dict[str, Any]:
    """Return the effective speedup: gain over cost, the cost in FLOPs or in measured time."""
    cost = np.log(pair.flops[1] / pair.flops[0])  # [rungs]
    by_compute = exponential(found.gain - cost)
    by_time = exponential(found.gain[:, -1] + found.speeds[:, -1])
    is_timed = math.isfinite(found.speeds[0, -1])
    sensitivity = []
    for l_inf in sorted(possible_l_inf(pair)):
        gain = log_gain(found.losses[:1], fit_law(found.losses[:1], pair.flops, l_inf))
        value = finite(float(exponential(gain[0, -1:] - cost[-1:])[0]))
        sensitivity.append({"l_inf": l_inf, "value": value})
    return {
        "compute": measured(by_compute[:, -1]),
        "time": measured(by_time) if is_timed else None,
        "by_rung": [measured(by_compute[:, rung]) for rung in range(by_compute.shape[1])],
        "if_l_inf": sensitivity,
        "cost": float(np.exp(cost[-1])),
    }


def exponential(values: Floats) -> Floats:
    """Return e^values, infinite where that is too large."""
    with np.errstate(over="ignore"):
        result: Floats = np.exp(values)
    return result


def describe_trend(pair: Pair, found: Estimates) -> dict[str, Any]:
    """Return how the gain, and the difference in nats, change with compute."""
    flops, trend = pair.flops[0], found.trend
    at = np.log10(flops) - np.log10(flops).mean()
    differences = pair.losses[:, 1] - pair.losses[:, 0]  # [seeds, rungs]
    slopes = paired_test((differences @ at / (at @ at)).tolist())
    has_draws = len(found.gain) > 1
    return {
        "factor_per_decade": measured(exponential(trend.slope)),
        "p": two_sided_p(trend.slope[1:]) if has_draws else None,
        "gain_at": [measured(exponential(trend.at(flops[end]))) for end in (0, -1)],
        "gain_next": measured(exponential(trend.at(next_flops(flops)))),
        "nats": {
            "slope": slopes.delta,
            "ci95": slopes.ci,
            "p": slopes.p,
            "line_at": [float(differences.mean() + slopes.delta * at[end]) for end in (0, -1)],
        },
    }


def describe_next(pair: Pair, found: Estimates) -> dict[str, Any]:
    """Return what law and trend say about one rung beyond the largest size, if both go on."""
    flops = next_flops(pair.flops[0])
    baseline, difference = predict_pair(found.law, found.trend, flops)
    cost = float(np.log(pair.flops[1, -1] / pair.flops[0, -1]))
    return {
        "flops": flops,
        "baseline": measured(baseline),
        "difference": measured(difference),
        "speedup": measured(exponential(found.trend.at(flops) - cost)),
    }


def back_test(pair: Pair) -> dict[str, Any] | None:
    """Return how well the largest size is predicted from the others; None for two sizes.

    "baseline" and "difference": predicted, observed, error (predicted - observed, nats), ci95 of
    the error, covered (whether 0 is in it). "l_inf": the values that L_inf was taken for, where
    what is left is too few sizes to fit it; the interval is over all of them then, the prediction
    that of the first.
    """
    lower = pair.without_top()
    rungs = lower.flops.shape[1]
    if rungs < 2:
        return None
    choices: Sequence[float | None] = [None] if rungs >= FREE_RUNGS else possible_l_inf(lower)
    found = [predict_top(pair, lower, choice) for choice in choices]
    top = pair.losses[..., -1].mean(0)
    observed = (float(top[0]), float(top[1] - top[0]))
    names = ("baseline", "difference")
    return {
        **{
            name: summarise_errors([one[i] for one in found], observed[i])
            for i, name in enumerate(names)
        },
        "l_inf": [choice for choice in choices if choice is not None],
    }


def predict_top(pair: Pair, lower: Pair, l_inf: float | None) -> tuple[Floats, Floats]:
    """Return the errors [1 + draws] of the baseline's loss and of the difference at the largest
    size, predicted from the others: the same draws are predicted and observed.
    """
    found, seen = estimate(lower, l_inf), estimate_means(pair)
    baseline, difference = predict_pair(found.law, found.trend, float(pair.flops[0, -1]))
    return baseline - seen[:, 0], difference - (seen[:, 1] - seen[:, 0])


def estimate_means(pair: Pair) -> Floats:
    """Return means over seeds and the draws of them [1 + draws, 2] at the largest size, with the
    weights that ``estimate`` has.
    """
    values = pair.losses[..., -1]
    means = values.mean(0)[None]
    return np.concatenate([means, draw_means(values)]) if len(values) > 1 else means


def summarise_errors(errors: Sequence[Floats], observed: float) -> dict[str, Any]:
    """Return a prediction, and an interval of its error over all assumptions."""
    error = float(errors[0][0])
    intervals = [None if len(one) < 2 else interval(one[1:]) for one in errors]
    ends, covered = None, None
    if all(one is not None for one in intervals):
        low = min(one[0] for one in intervals if one is not None)
        high = max(one[1] for one in intervals if one is not None)
        ends, covered = [finite(low), finite(high)], low <= 0 <= high
    return {
        "predicted": finite(observed + error),
        "observed": observed,
        "error": finite(error),
        "ci95": ends,
        "covered": covered,
    }
