"""The statistics of paired runs: what a few seeds can and cannot tell. Pure functions of arrays.

A pair is an arm and the baseline at one seed: same data in the same order, and equal initial values
where they share parameters. The run is the unit: documents and tokens tell how well one model was
measured, not how another run would have come out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Floats = NDArray[np.float64]
RESAMPLES = 10_000
CELLS = 10_000_000  # numbers held at once while resampling
MOST = 10_000  # seeds; a plan of more is none
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
REACH = 9.0  # standard deviations beyond which a normal variable is not looked for
TINY = 1e-16


class Paired(NamedTuple):
    """What the differences of pairs say about the mean difference."""

    pairs: int
    delta: float  # mean of arm - baseline
    std: float | None  # of the differences; None for one pair
    ci: tuple[float, float] | None
    p: float | None  # two-sided, of no difference (Student's t)


class Equivalence(NamedTuple):
    """Two one-sided tests (Schuirmann 1987): is the mean difference within +-margin?"""

    margin: float
    p: float | None  # the larger of the two; None for one pair


def paired(differences: Sequence[float], confidence: float = 0.95) -> Paired:
    """The paired t test and its interval. Differences that are all equal (runs that agree bitwise,
    say) leave no doubt.
    """
    found = np.asarray(differences, dtype=np.float64)
    delta = float(found.mean())
    if len(found) < 2:
        return Paired(len(found), delta, None, None, None)
    std = spread(found)
    if std == 0.0:
        return Paired(len(found), delta, 0.0, (delta, delta), 1.0 if delta == 0.0 else 0.0)
    half = float(stats.t.ppf(0.5 + confidence / 2, len(found) - 1)) * std / math.sqrt(len(found))
    p = float(2 * stats.t.sf(abs(delta) / std * math.sqrt(len(found)), len(found) - 1))
    return Paired(len(found), delta, std, (delta - half, delta + half), p)


def spread(found: Floats) -> float:
    """The sample's standard deviation; what is only rounding counts as none."""
    std = float(found.std(ddof=1))
    return 0.0 if std <= 1e-12 * float(np.abs(found).max()) else std


def equivalence(differences: Sequence[float], margin: float) -> Equivalence:
    """Whether the mean difference is within +-margin, by two one-sided t tests."""
    found = np.asarray(differences, dtype=np.float64)
    if len(found) < 2:
        return Equivalence(margin, None)
    delta, std, degrees = float(found.mean()), spread(found), len(found) - 1
    if std == 0.0:
        return Equivalence(margin, 0.0 if abs(delta) < margin else 1.0)
    error = std / math.sqrt(len(found))
    return Equivalence(
        margin,
        float(
            max(
                stats.t.sf((margin - delta) / error, degrees),
                stats.t.sf((margin + delta) / error, degrees),
            )
        ),
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P values adjusted so that the chance of any false finding among all stays bounded (Holm
    1979); None stays None.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    reached = 0.0
    for rank, (p, i) in enumerate(known):
        reached = max(reached, min(1.0, (len(known) - rank) * p))
        adjusted[i] = reached
    return adjusted


def power(delta: float, std: float, pairs: int, alpha: float = 0.05) -> float:
    """The chance that a two-sided paired t test finds a true mean difference: P(|T| > c), T
    noncentral t.
    """
    if pairs < 2:
        return 0.0
    degrees = pairs - 1
    critical, shift = float(stats.t.isf(alpha / 2, degrees)), abs(delta) / std * math.sqrt(pairs)
    return min(1.0, upper_tail(critical, shift, degrees) + upper_tail(critical, -shift, degrees))


def upper_tail(critical: float, shift: float, degrees: int) -> float:
    """P(T > c) of a noncentral t variable (Z + shift) / S with c > 0, where S^2 is a chi squared
    variable over its degrees of freedom: the mean of Phi(shift - c S), by Gauss-Legendre
    quadrature. (The series of ``scipy.stats.nct`` gives NaN for many arguments.)

    The chi variable is within 9 of sqrt(degrees) but for a chance below 1e-16, and Phi rises over 9
    / c to both sides of shift / c: between these edges the integrand is smooth.
    """
    low, high = max(1 - REACH / math.sqrt(degrees), TINY), 1 + REACH / math.sqrt(degrees)
    middle, slope = shift / critical, REACH / critical
    inner = np.clip([middle - slope, middle, middle + slope], low, high)
    edges = np.array([low, *inner, high])  # [5]
    centres, halves = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2  # [4]
    s = centres[:, None] + halves[:, None] * NODES  # [4, nodes]
    density = np.exp((degrees - 1) * np.log(s) - degrees * (s**2 - 1) / 2)  # of S, up to a factor
    weights = halves[:, None] * WEIGHTS * density
    return float((weights * special.ndtr(shift - critical * s)).sum() / weights.sum())


def seeds_needed(
    delta: float, std: float | None, wanted: float = 0.8, alpha: float = 0.05
) -> int | None:
    """How many pairs find a difference with the ``wanted`` chance; None where nothing is known of
    the noise or MOST would not do.
    """
    if std is None or delta == 0.0:
        return None
    if std == 0.0:
        return 2
    if power(delta, std, MOST, alpha) < wanted:
        return None
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if power(delta, std, middle, alpha) < wanted else (low, middle)
    return high


def over_documents(
    baseline: Floats, arm: Floats, tokens: Floats, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The interval of the mean difference per token over other held-out texts of the same kind:
    documents are drawn anew.

    Summed losses [seeds, documents] of both, tokens [documents]. Seeds are not drawn anew: this is
    the uncertainty that the choice of text adds, for these very models.
    """
    differences = (arm - baseline).mean(0)  # [documents]
    draw, even = np.random.default_rng(seed), np.full(len(tokens), 1 / len(tokens))
    means: list[Floats] = []
    for _ in range(0, RESAMPLES, chunk := max(1, min(RESAMPLES, CELLS // len(tokens)))):
        counts = draw.multinomial(len(tokens), even, size=chunk)  # [chunk, documents]
        means.append((counts @ differences) / (counts @ tokens))
    low, high = np.quantile(np.concatenate(means), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def correlation(baseline: Sequence[float], arm: Sequence[float]) -> float | None:
    """How much of the seeds' noise two arms share (Pearson); None where it cannot be told."""
    if len(baseline) < 3:
        return None
    one, other = np.asarray(baseline), np.asarray(arm)
    if spread(one) == 0.0 or spread(other) == 0.0:
        return None
    return float(np.corrcoef(one, other)[0, 1])
