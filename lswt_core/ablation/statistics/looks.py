"""Tests that stay valid however often one looks: alpha spending (Lan & DeMets 1983) over the number
of pairs, with exact boundaries for Student's t of growing data (Jennison & Turnbull 1991).

A look is a verdict about the first n pairs. Looks are declared before the first one, and most of
alpha is spent there. The rest (RESERVE) is spent over *every* further number of pairs, looked at
or not: so the choice of the next look may depend on the data.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
Looks = tuple[int, ...]  # numbers of pairs
RESERVE = 0.2  # share of alpha for looks that were not declared
MAXIMUM = 50  # pairs up to which a look that was not declared has a share of alpha
EXACT = 200  # pairs up to which boundaries are exact; beyond: Bonferroni's bound
# whose boundaries are computed; between them: interpolation
ALPHAS = np.array([0.05 * math.exp2(power) for power in range(-14, 4)])
ANGLES = 301  # points of the grid of an angle
WIDTH = 8.0  # of angles, in standard deviations: beyond is a probability below 1e-14
NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)


def spend(declared: Looks, pairs: int) -> float:
    """Return the share of alpha that is spent at a number of pairs.

    Declared looks share 1 - RESERVE in proportion to the pairs that each adds (Kim & DeMets 1987,
    power 1). From the first of them to MAXIMUM, the reserve grows with the logarithm of the pairs:
    the same for every doubling.
    """
    looks = sorted(set(declared))
    first, last = looks[0], looks[-1]
    before = max([0, *(look for look in looks if look < pairs)])
    share = (1 - RESERVE) * (pairs - before) / last if pairs in looks else 0.0
    if first < pairs <= MAXIMUM:
        share += RESERVE * math.log(pairs / (pairs - 1)) / math.log(MAXIMUM / first)
    return share


def valid_p(p: float | None, declared: Looks, pairs: int, sides: int = 2) -> float | None:
    """Return the p value that is valid under all looks: the smallest alpha at which the t-test of
    these pairs, whose p value is ``p`` at a single look, is significant. 1 where no alpha is spent.

    ``sides``: 2 for a test of no difference, 1 for a one-sided test.
    """
    if p is None:
        return None
    levels = boundaries(tuple(sorted(set(declared))), sides).levels(pairs)
    if not levels.all() or p >= levels[-1]:
        return 1.0
    if p <= levels[0]:
        return float(p * ALPHAS[0] / levels[0])
    return float(np.exp(np.interp(math.log(p), np.log(levels), np.log(ALPHAS))))


def nominal_level(alpha: float, declared: Looks, pairs: int, sides: int = 2) -> float:
    """Return the level of the t-test of these pairs at which all looks together have level
    ``alpha``: the inverse of ``valid_p``. 0 where no alpha is spent.
    """
    levels = boundaries(tuple(sorted(set(declared))), sides).levels(pairs)
    if not levels.all():
        return 0.0
    if alpha <= ALPHAS[0]:
        return float(levels[0] * alpha / ALPHAS[0])
    return float(np.exp(np.interp(math.log(alpha), np.log(ALPHAS), np.log(levels))))


@lru_cache(maxsize=64)
def boundaries(declared: Looks, sides: int) -> Boundaries:
    """Return the boundaries of these looks, which are computed once."""
    return Boundaries(declared, sides)


class Boundaries:
    """The boundaries of a t-test, for each of ALPHAS and every number of pairs.

    With n pairs x, let sin(angle) = sum(x) / (sqrt(n) |x|), so that t = sqrt(n - 1) tan(angle).
    Without a difference x / |x| is uniform on a sphere: the density of the angle is proportional to
    cos(angle)^(n - 2). Given the angle, how it was reached does not depend on |x|; the last pair is
    x_n / |x| = sin(angle) / sqrt(n) + cos(angle) sqrt(1 - 1/n) sin(tau), where the density of tau
    is proportional to cos(tau)^(n - 3). Integrating over tau gives ``inside``, the probability that
    no boundary was crossed before, given the angle; where it is crossed next follows from the
    probability of angles beyond.
    """

    def __init__(self, declared: Looks, sides: int) -> None:
        self.declared, self.sides, self.pairs = declared, sides, declared[0]
        self.found = {self.pairs: ALPHAS * spend(declared, self.pairs)}
        self.bound = sine_of_level(self.found[self.pairs], self.pairs, sides)  # [alphas]
        self.angles = grid(self.pairs)
        self.inside = np.ones((len(ALPHAS), ANGLES))

    def levels(self, pairs: int) -> Floats:
        """Return the levels of single tests of that many pairs [alphas]; 0: none."""
        if pairs < self.declared[0]:
            return np.zeros_like(ALPHAS)
        if pairs > EXACT and pairs not in self.found:
            return ALPHAS * spend(self.declared, pairs)
        while self.pairs < pairs:
            self.add_pair()
        return self.found[pairs]

    def add_pair(self) -> None:
        """Find the boundary of one pair more."""
        self.pairs += 1
        angles = grid(self.pairs)
        self.inside = self.not_crossed(angles)
        self.angles = angles
        beyond = self.sides * upper_tail(angles, self.pairs, self.inside)  # [alphas, angles >= 0]
        share, middle = spend(self.declared, self.pairs), ANGLES // 2
        if share == 0.0:
            self.bound = np.full_like(ALPHAS, np.sin(angles[-1]))
            self.found[self.pairs] = np.zeros_like(ALPHAS)
            return
        rows = zip(np.log(ALPHAS * share), np.log(np.maximum(beyond, 1e-300)), strict=True)
        reached = [np.interp(-wanted, -row, angles[middle:]) for wanted, row in rows]
        self.bound = np.sin(reached)
        self.found[self.pairs] = level_of_sine(self.bound, self.pairs, self.sides)

    def not_crossed(self, angles: Floats) -> Floats:
        """Return the probability that no boundary was crossed up to one pair less, given the angle
        of all pairs [alphas, angles].
        """
        n, sine = self.pairs, np.sin(angles)
        low, high = self.range_of_last(sine)
        tau = (low + high)[..., None] / 2 + (high - low)[..., None] / 2 * NODES
        last = sine[:, None] / math.sqrt(n) + spread(sine, n)[:, None] * np.sin(tau)
        before = (math.sqrt(n) * sine[:, None] - last) / np.sqrt((n - 1) * (1 - last**2))
        before = np.arcsin(np.clip(before, -1, 1))  # [alphas, angles, nodes]
        rows = zip(before, self.inside, strict=True)
        values = np.array([np.interp(angle, self.angles, row) for angle, row in rows])
        density = normalizer(n - 1) * np.cos(tau) ** (n - 3)
        integral: Floats = (high - low) / 2 * (density * values * WEIGHTS).sum(-1)
        return integral

    def range_of_last(self, sine: Floats) -> tuple[Floats, Floats]:
        """Return between which tau of the last pair the pairs before it are within their boundary
        [alphas, angles]: where (sqrt(n) sine - last)^2 <= (n - 1) bound^2 (1 - last^2).
        """
        n, total = self.pairs, math.sqrt(self.pairs) * sine
        square = (n - 1) * self.bound[:, None] ** 2
        root = np.sqrt(np.maximum(square * (1 + square - total**2), 0.0))
        ends = [(total - root) / (1 + square), (total + root) / (1 + square)]
        low, high = (  # [alphas, angles]
            np.arcsin(np.clip((end - sine / math.sqrt(n)) / spread(sine, n), -1, 1)) for end in ends
        )
        if self.sides == 1:  # the lower boundary does not exist
            low = np.where(total > ends[0], low, -np.pi / 2)
            high = np.where(total > ends[1], high, np.pi / 2)
        inner: Floats = np.maximum(low, -reach(n))
        outer: Floats = np.minimum(high, reach(n))
        return inner, outer


def reach(pairs: int) -> float:
    """Return the largest angle that is looked at."""
    return min(math.pi / 2 * (1 - 1e-6), WIDTH / math.sqrt(pairs))


def grid(pairs: int) -> Floats:
    """Return the grid of the angle [angles]."""
    return np.linspace(-reach(pairs), reach(pairs), ANGLES)


def spread(sine: Floats, pairs: int) -> Floats:
    """Return by how much the last of some pairs can vary, given the sine of their angle."""
    deviation: Floats = np.sqrt((1 - sine**2) * (1 - 1 / pairs))
    return deviation


def normalizer(pairs: int) -> float:
    """Return 1 over the integral of cos(angle)^(pairs - 2) from -pi/2 to pi/2."""
    return math.exp(math.lgamma(pairs / 2) - math.lgamma((pairs - 1) / 2)) / math.sqrt(math.pi)


def upper_tail(angles: Floats, pairs: int, inside: Floats) -> Floats:
    """Return the probability of an angle beyond each that is not negative, without a boundary
    crossed before [alphas, angles >= 0].
    """
    density = normalizer(pairs) * np.cos(angles) ** (pairs - 2) * inside
    density = density[:, ANGLES // 2 :]
    pieces = (density[:, 1:] + density[:, :-1]) / 2 * (angles[1] - angles[0])
    sums = np.cumsum(pieces[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([sums, np.zeros((len(sums), 1))], axis=1)


def sine_of_level(level: Floats, pairs: int, sides: int) -> Floats:
    """Return the sine of the angle at which a t-test has a level."""
    t = -special.stdtrit(pairs - 1, level / sides)
    sine: Floats = t / np.sqrt(pairs - 1 + t**2)
    return sine


def level_of_sine(sine: Floats, pairs: int, sides: int) -> Floats:
    """Return the level of a t-test: the inverse of ``sine_of_level``."""
    t = sine * math.sqrt(pairs - 1) / np.sqrt(1 - sine**2)
    level: Floats = sides * special.stdtr(pairs - 1, -t)
    return level
