"""Averages of the weights over training: none, and an exponential moving average."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Lt

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Component, WeightAverage


class NoAverage(WeightAverage):
    """The weights themselves are evaluated and saved."""

    name = "none"
    is_active = False

    def rate(self, step: int) -> float:
        """The average is the weights."""
        return 1.0


class ExponentialMovingAverage(WeightAverage):
    """An exponential moving average (EMA) of the weights: after update t, ``average = d average +
    (1 - d) weights`` with ``d = min(decay, (1 + t) / (warmup + t))``, Polyak averaging with a decay
    that grows, so that the initial values are forgotten.

    Only every ``every``-th update is averaged; ``decay`` is then that of each averaged update.
    """

    name = "ema"
    citation = """@article{polyak1992acceleration,
  title={Acceleration of Stochastic Approximation by Averaging},
  author={Polyak, Boris T and Juditsky, Anatoli B},
  journal={SIAM Journal on Control and Optimization}, volume={30}, number={4}, year={1992}}
@article{moralesbrotons2024exponential,
  title={Exponential Moving Average of Weights in Deep Learning: Dynamics and Benefits},
  author={Morales-Brotons, Daniel and Vogels, Thijs and Hendrikx, Hadrien},
  journal={arXiv preprint arXiv:2411.18704}, year={2024}}"""

    def __init__(
        self,
        *,
        decay: Annotated[float, Gt(0), Lt(1)] = 0.999,
        warmup: Annotated[float, Ge(1)] = 10.0,
        every: Annotated[int, Ge(1)] = 1,
    ) -> None:
        self.decay, self.warmup, self.every = decay, warmup, every

    def rate(self, step: int) -> float:
        """1 - d, 0 between averaged updates."""
        if step % self.every:
            return 0.0
        count = step // self.every
        return 1.0 - min(self.decay, (1 + count) / (self.warmup + count))


@hookimpl
def lswt_components() -> list[type[Component]]:
    """Offer weight averages."""
    return [NoAverage, ExponentialMovingAverage]
