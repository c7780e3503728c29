"""Parametrisations with one mistake each."""

from __future__ import annotations

import random

from lswt_core.interfaces import Dims, ParameterInfo, Parametrisation, Scaling
from mutants.expected import CITATION, caught_by


class ByFanIn(Parametrisation):
    """A correct parametrisation, the base of mutants: muP for Adam with a base width of 32."""

    citation = CITATION

    def base_dims(self, dims: Dims) -> Dims:
        share = 32 / dims.d_model
        heads, hidden = round(dims.n_heads * share), round(dims.d_ffn * share)
        return dims._replace(d_model=32, n_heads=heads, d_ffn=hidden)

    def scaling(self, parameter: ParameterInfo) -> Scaling:
        if parameter.role != "matrix":
            return Scaling()
        m = parameter.shape[-1] / parameter.base_shape[-1]
        return self.of_matrix(m)

    def of_matrix(self, m: float) -> Scaling:
        return Scaling(init=m**-0.5, lr=1 / m)


@caught_by("factors")
class ReachesZero(ByFanIn, Parametrisation):
    """The factor of the widest matrices is 0."""

    name = "reaches-zero"

    def of_matrix(self, m: float) -> Scaling:
        return Scaling(lr=max(0.0, (4 - m) / 3))


@caught_by("factors")
class DrawsFactors(ByFanIn, Parametrisation):
    """Draws its factors."""

    name = "draws-factors"

    def of_matrix(self, m: float) -> Scaling:
        return Scaling(lr=1 if m == 1 else random.random())


@caught_by("base model")
class ScalesTheBase(ByFanIn, Parametrisation):
    """Scales the base model as well."""

    name = "scales-the-base"

    def of_matrix(self, m: float) -> Scaling:
        return Scaling(init=m**-0.5, lr=0.5 / m)


@caught_by("coordinate check")
class LearnsFaster(ByFanIn, Parametrisation):
    """Lets wide matrices learn faster instead of slower."""

    name = "learns-faster"

    def of_matrix(self, m: float) -> Scaling:
        return Scaling(init=m**-0.5, lr=m**0.5)
