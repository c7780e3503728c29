"""Scaling laws L = L_inf + A (C / C0)^-alpha of loss L over training compute C, fitted to several
arms at once. Pure functions of arrays.

L_inf (the irreducible loss) and alpha are shared by all arms, A is each arm's own: most changes of
architecture move A and leave alpha ("On the origin of algorithmic progress in AI", arXiv
2511.21622). Whether that holds is seen in the trend of the speedup (``speedup.Trend``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
ALPHAS = (0.004, 3.0)  # exponents that are tried, from and to
GRID, ZOOMS, FINE = 25, 4, 9  # exponents at first; refinements around the best; exponents of each
FREE_RUNGS = 3  # sizes from which on L_inf can be fitted


class Law(NamedTuple):
    """Fitted laws; NaN where losses do not fall with compute, so that no law describes them."""

    l_inf: Floats  # [...] nats
    alpha: Floats  # [...]
    a: Floats  # [..., arms] reducible loss at C0, nats
    reference_flops: float  # C0

    def predict(self, flops: Floats) -> Floats:
        """Return losses [..., arms, rungs] at training FLOPs [arms, rungs]."""
        powers = (flops / self.reference_flops) ** -self.alpha[..., None, None]
        return self.l_inf[..., None, None] + self.a[..., None] * powers


class Profile(NamedTuple):
    """The best laws for given exponents."""

    rss: Floats  # [..., exponents] sum of squared residuals; infinite: no law
    l_inf: Floats  # [..., exponents]
    a: Floats  # [..., exponents, arms]


def fit_law(losses: Floats, flops: Floats, l_inf: Floats | float | None = None) -> Law:
    """Fit laws to losses [..., arms, rungs] at training FLOPs [arms, rungs], by least squares in
    nats; ``l_inf`` is fixed where it is given, else fitted, and at least 0.

    For a given alpha the law is linear in L_inf and A, whose best values are known in closed form
    (variable projection, Golub and Pereyra 1973): what is left is a search over one number, which
    finds the global optimum without starting values. Not Huber's loss on log L (Hoffmann et al.
    2022, arXiv 2203.15556), which guards hundreds of single runs against outliers: a ladder has a
    mean over seeds at each of few sizes, and nearly as many parameters.
    """
    if l_inf is None and losses.shape[-1] < FREE_RUNGS:
        raise ValueError(f"L_inf can be fitted to {FREE_RUNGS} sizes or more")
    reference = float(np.exp(np.log(flops).mean()))
    x = flops / reference
    lead = losses.shape[:-2]
    alphas = np.broadcast_to(np.geomspace(*ALPHAS, GRID), (*lead, GRID))
    for _ in range(ZOOMS):
        best = profile_alpha(losses, x, alphas, l_inf).rss.argmin(-1)[..., None]
        low = np.take_along_axis(alphas, np.maximum(best - 1, 0), -1)
        high = np.take_along_axis(alphas, np.minimum(best + 1, alphas.shape[-1] - 1), -1)
        alphas = low * (high / low) ** np.linspace(0, 1, FINE)
    alpha = find_vertex(alphas, profile_alpha(losses, x, alphas, l_inf).rss)
    return law_at(alpha, profile_alpha(losses, x, alpha, l_inf), reference)


def find_vertex(alphas: Floats, rss: Floats) -> Floats:
    """Return the exponent [..., 1] at the vertex of the parabola through the best of some equally
    spaced (in their logarithms) and the two beside it; the best one where there is no parabola.
    """
    best = np.clip(rss.argmin(-1), 1, alphas.shape[-1] - 2)[..., None]
    left, middle, right = (np.take_along_axis(rss, best + step, -1) for step in (-1, 0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        shift = (left - right) / (2 * (left - 2 * middle + right))  # in steps
    step = np.log(alphas[..., 1:2] / alphas[..., :1])
    vertex = np.take_along_axis(alphas, best, -1) * np.exp(np.clip(shift, -1, 1) * step)
    nearest: Floats = np.take_along_axis(alphas, rss.argmin(-1)[..., None], -1)
    return np.where(np.isfinite(shift), vertex, nearest)


def law_at(alpha: Floats, profile: Profile, reference: float) -> Law:
    """Return the law with an exponent [..., 1] that was found."""
    has_law = np.isfinite(profile.rss[..., 0])

    def known(values: Floats) -> Floats:
        return np.where(has_law, values[..., 0], np.nan)

    a = np.where(has_law[..., None], profile.a[..., 0, :], np.nan)
    return Law(known(profile.l_inf), known(alpha), a, reference)


def profile_alpha(
    losses: Floats, x: Floats, alphas: Floats, l_inf: Floats | float | None
) -> Profile:
    """Return the best law for each exponent [..., exponents]; x is C / C0 [arms, rungs].

    With z = x^-alpha and residuals r(v) = v - z (z v) / (z z) of each arm's projection on z, the
    sum of squares is ||r(L) - L_inf r(1)||^2: a parabola in L_inf, whose minimum above 0 is the
    vertex, or 0. Where losses rise A would be negative, which is no law.
    """
    z = x ** -alphas[..., None, None]  # [..., exponents, arms, rungs]
    norm = (z * z).sum(-1, keepdims=True)
    own = losses[..., None, :, :]

    def residual(values: Floats) -> Floats:
        return values - z * (z * values).sum(-1, keepdims=True) / norm

    of_losses, of_one = residual(own), residual(np.ones_like(x))
    if l_inf is None:
        curvature = np.maximum((of_one * of_one).sum((-1, -2)), np.finfo(float).tiny)
        vertex = (of_losses * of_one).sum((-1, -2)) / curvature
        level = np.maximum(vertex, 0.0)
    else:
        level = np.broadcast_to(np.asarray(l_inf, float)[..., None], alphas.shape)
    off = of_losses - level[..., None, None] * of_one
    a = (z * (own - level[..., None, None])).sum(-1) / norm[..., 0]
    rss = np.where((a > 0).all(-1), (off * off).sum((-1, -2)), np.inf)
    return Profile(rss, level, a)
