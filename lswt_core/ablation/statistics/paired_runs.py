"""Statistics of paired runs: t-test, equivalence test, power, Holm-Bonferroni correction and
bootstrap. Pure functions of arrays.

A pair is the arm and the baseline at one seed: the same batches in the same order, and equal
initial values of shared parameters. The sampling unit is the run: documents and tokens say how
precisely one model was evaluated, not how much another seed would differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
RESAMPLES = 10_000
CHUNK_NUMBERS = 10_000_000  # in memory at a time while resampling
MAX_SEEDS = 10_000  # more are out of reach
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
REACH = 9.0  # standard deviations; a normal variable is beyond with probability below 1e-16
TINY = 1e-16


class PairedTest(NamedTuple):
    """The paired t-test of the mean difference."""

    pairs: int
    delta: float  # mean of arm - baseline
    std: float | None  # of the differences; None for one pair
    ci: tuple[float, float] | None  # confidence interval of the mean
    p: float | None  # two-sided, of no difference (Student's t)


class EquivalenceTest(NamedTuple):
    """Two one-sided tests (TOST, Schuirmann 1987) that the mean difference is within +-margin."""

    margin: float
    p: float | None  # the larger of the two; None for one pair


def paired_test(differences: Sequence[float], confidence: float = 0.95) -> PairedTest:
    """Return the paired t-test and its confidence interval, none at a confidence of 1.

    Differences that are all equal (of runs that agree bitwise, say) have p 0, or 1 if they are 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    delta = float(values.mean())
    if len(values) < 2:
        return PairedTest(len(values), delta, None, None, None)
    std = sample_std(values)
    if std == 0.0:
        return PairedTest(len(values), delta, 0.0, (delta, delta), 1.0 if delta == 0.0 else 0.0)
    error, degrees = std / math.sqrt(len(values)), len(values) - 1
    half, interval = float(-special.stdtrit(degrees, (1 - confidence) / 2)) * error, None
    if math.isfinite(half):
        interval = delta - half, delta + half
    p = float(2 * special.stdtr(degrees, -abs(delta) / error))
    return PairedTest(len(values), delta, std, interval, p)


def sample_std(values: Floats | Sequence[float]) -> float:
    """Return the sample standard deviation; 0 if it is of the size of rounding errors."""
    std = float(np.std(values, ddof=1))
    return 0.0 if std <= 1e-12 * float(np.abs(values).max()) else std


def equivalence_test(differences: Sequence[float], margin: float) -> EquivalenceTest:
    """Return the p value of the null hypothesis that the mean difference is outside of +-margin."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return EquivalenceTest(margin, None)
    delta, std, degrees = float(values.mean()), sample_std(values), len(values) - 1
    if std == 0.0:
        return EquivalenceTest(margin, 0.0 if abs(delta) < margin else 1.0)
    error = std / math.sqrt(len(values))
    return EquivalenceTest(margin, float(special.stdtr(degrees, (abs(delta) - margin) / error)))


def clear_p(values: Sequence[float], margin: float) -> float | None:
    """Return the p value of the null hypothesis that the mean difference is at most ``margin`` in
    the direction that it was seen in, two-sided: it is at most alpha where the interval of level
    1 - alpha is clear of +-margin. None for one pair.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return None
    beyond, std = abs(float(sample.mean())) - margin, sample_std(sample)
    if beyond <= 0:
        return 1.0
    if std == 0.0:
        return 0.0
    return float(2 * special.stdtr(len(sample) - 1, -beyond / std * math.sqrt(len(sample))))


def adjust_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted by Holm-Bonferroni (Holm 1979), which bounds the family-wise error
    rate; None stays None.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    reached = 0.0
    for rank, (p, i) in enumerate(known):
        reached = max(reached, min(1.0, (len(known) - rank) * p))
        adjusted[i] = reached
    return adjusted


def power(delta: float, std: float, pairs: int, alpha: float = 0.05) -> float:
    """Return the power of a two-sided paired t-test at a true mean difference: P(|T| > c), T
    noncentral t.
    """
    if pairs < 2:
        return 0.0
    degrees = pairs - 1
    critical, shift = (
        float(-special.stdtrit(degrees, alpha / 2)),
        abs(delta) / std * math.sqrt(pairs),
    )
    return min(1.0, upper_tail(critical, shift, degrees) + upper_tail(critical, -shift, degrees))


def upper_tail(critical: float, shift: float, degrees: int) -> float:
    """Return P(T > c) of a noncentral t variable (Z + shift) / S with c > 0, where S^2 is a chi
    squared variable over its degrees of freedom: the mean of Phi(shift - c S). (The series of
    ``scipy.stats.nct`` gives NaN for many arguments.)
    """
    return chi_mean(critical, shift, degrees, special.ndtr)


def chi_mean(
    critical: float, shift: float, degrees: int, function: Callable[[Floats], Floats]
) -> float:
    """Return the mean of a function of ``shift - critical S``, S as in ``upper_tail``, by
    Gauss-Legendre quadrature; the function is constant beyond REACH, and may bend at 0.

    The chi variable is within REACH of sqrt(degrees), except with probability below 1e-16, and the
    function varies over REACH / c on both sides of shift / c: between these edges the integrand is
    smooth.
    """
    low, high = max(1 - REACH / math.sqrt(degrees), TINY), 1 + REACH / math.sqrt(degrees)
    middle, slope = shift / critical, REACH / critical
    inner = np.clip([middle - slope, middle, middle + slope], low, high)
    edges = np.array([low, *inner, high])  # [5]
    centres, halves = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2  # [4]
    s = centres[:, None] + halves[:, None] * NODES  # [4, nodes]
    density = np.exp((degrees - 1) * np.log(s) - degrees * (s**2 - 1) / 2)  # of S, up to a factor
    weights = halves[:, None] * WEIGHTS * density
    return float((weights * function(shift - critical * s)).sum() / weights.sum())


def equivalence_power(margin: float, std: float, pairs: int, alpha: float = 0.05) -> float:
    """Return the probability that TOST of level ``alpha`` finds a true difference of 0 within
    +-margin: P(|Z| < margin sqrt(n) / std - c S), with Z and S as in ``upper_tail``.
    """
    if pairs < 2:
        return 0.0
    degrees = pairs - 1
    critical, reach = float(-special.stdtrit(degrees, alpha)), margin / std * math.sqrt(pairs)
    return chi_mean(critical, reach, degrees, within)


def within(reach: Floats) -> Floats:
    """Return P(|Z| < reach) of a normal variable; 0 where the reach is negative."""
    probability: Floats = np.maximum(2 * special.ndtr(reach) - 1, 0.0)
    return probability


def seeds_needed(
    delta: float, std: float | None, alpha: float = 0.05, wanted: float = 0.8
) -> int | None:
    """Return how many pairs detect a difference with power ``wanted`` in a test of level ``alpha``;
    None if the noise is unknown or MAX_SEEDS are too few.
    """
    if std is None or delta == 0.0:
        return None
    if std == 0.0:
        return 2
    return fewest_pairs(lambda pairs: power(delta, std, pairs, alpha), wanted)


def equivalence_seeds(
    margin: float, std: float | None, alpha: float = 0.05, wanted: float = 0.8
) -> int | None:
    """Return how many pairs find two arms equivalent that do not differ, with probability
    ``wanted``; None as in ``seeds_needed``.
    """
    if std is None:
        return None
    if std == 0.0:
        return 2
    return fewest_pairs(lambda pairs: equivalence_power(margin, std, pairs, alpha), wanted)


def fewest_pairs(chance: Callable[[int], float], wanted: float) -> int | None:
    """Return the least number of pairs with a chance, which grows with them; None if MAX_SEEDS have
    too little.
    """
    if chance(MAX_SEEDS) < wanted:
        return None
    low, high = 1, MAX_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chance(middle) < wanted else (low, middle)
    return high


def std_upper_limit(std: float, pairs: int, confidence: float = 0.95) -> float:
    """Return the upper confidence limit of a standard deviation of normal noise (chi squared)."""
    degrees = pairs - 1
    return std * math.sqrt(degrees / float(special.chdtri(degrees, confidence)))


def bootstrap_documents(
    baseline: Floats, arm: Floats, tokens: Floats, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap confidence interval of the mean difference per token over other held-out
    documents of the same kind.

    Summed losses [seeds, documents] of both, tokens [documents]. Documents are resampled, seeds are
    not: this is the uncertainty from the choice of text, for these very models.
    """
    differences = (arm - baseline).mean(0)  # [documents]
    draw, even = np.random.default_rng(seed), np.full(len(tokens), 1 / len(tokens))
    means: list[Floats] = []
    for _ in range(0, RESAMPLES, chunk := max(1, min(RESAMPLES, CHUNK_NUMBERS // len(tokens)))):
        counts = draw.multinomial(len(tokens), even, size=chunk)  # [chunk, documents]
        means.append((counts @ differences) / (counts @ tokens))
    low, high = np.quantile(np.concatenate(means), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def correlation(baseline: Sequence[float], arm: Sequence[float]) -> float | None:
    """Return Pearson's correlation of the losses of two arms over seeds; None if there are fewer
    than three, or one of them does not vary.
    """
    if len(baseline) < 3:
        return None
    one, other = np.asarray(baseline), np.asarray(arm)
    if sample_std(one) == 0.0 or sample_std(other) == 0.0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
