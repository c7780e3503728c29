"""Learning-rate schedules: cosine, warm-up-stable-decay and constant, each with linear warm-up."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Horizon, Schedule


class Cosine(Schedule):
    """Linear warm-up, then half a cosine from the end of the warm-up to ``floor`` at the end of the
    run, which may lie within a step if it was given in tokens.

    The original code counts both in tokens, which is the same: every step has as many. A run that
    ends within its warm-up only warms up.
    """

    name = "cosine"

    def __init__(
        self,
        horizon: Horizon,
        *,
        warmup_steps: Annotated[int, Ge(0)] = 2000,
        floor: Annotated[float, Ge(0), Le(1)] = 0.1,
    ) -> None:
        super().__init__(horizon)
        self.warmup_steps, self.floor = warmup_steps, floor

    def factor(self, step: int) -> float:
        """The lower of warm-up and cosine; ``floor`` beyond the horizon."""
        progress = _progress(step, self.warmup_steps, self.horizon.end)
        cosine = (math.cos(math.pi * progress) / 2 + 0.5) * (1 - self.floor) + self.floor
        return min(_warmup_factor(step, self.warmup_steps), cosine)


class WarmupStableDecay(Schedule):
    """Linear warm-up, the peak learning rate, then decay to ``floor`` over the last ``decay_share``
    of the run (Hu et al. 2024, arXiv 2404.06395).

    ``shape`` "1-sqrt" falls fast at first (Hägele et al. 2024, arXiv 2405.18392).
    """

    name = "wsd"
    citation = """@inproceedings{hu2024minicpm,
  title = {MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training
    Strategies},
  author = {Hu, Shengding and others},
  booktitle = {Conference on Language Modeling},
  year = {2024},
  note = {arXiv 2404.06395}
}"""

    def __init__(
        self,
        horizon: Horizon,
        *,
        warmup_steps: Annotated[int, Ge(0)] = 2000,
        decay_share: Annotated[float, Gt(0), Le(1)] = 0.2,
        shape: Literal["linear", "1-sqrt"] = "linear",
        floor: Annotated[float, Ge(0), Le(1)] = 0.0,
    ) -> None:
        super().__init__(horizon)
        decay_steps = max(1, round(decay_share * horizon.steps))
        self.warmup_steps, self.decay_from = warmup_steps, horizon.steps - decay_steps
        self.shape, self.floor = shape, floor

    def factor(self, step: int) -> float:
        """The lower of warm-up and decay; ``floor`` beyond the horizon."""
        progress = _progress(step, self.decay_from, self.horizon.steps)
        if self.shape == "1-sqrt":
            progress = math.sqrt(progress)
        return min(_warmup_factor(step, self.warmup_steps), 1 - (1 - self.floor) * progress)


class Constant(Schedule):
    """The peak learning rate, after an optional linear warm-up."""

    name = "constant"

    def __init__(self, horizon: Horizon, *, warmup_steps: Annotated[int, Ge(0)] = 0) -> None:
        super().__init__(horizon)
        self.warmup_steps = warmup_steps

    def factor(self, step: int) -> float:
        """1, or less during the warm-up."""
        return _warmup_factor(step, self.warmup_steps)


def _warmup_factor(step: int, warmup_steps: int) -> float:
    if not warmup_steps:
        return 1.0
    return min(step / warmup_steps, 1.0)


def _progress(step: int, first: int, last: float) -> float:
    if last <= first:  # the run ends within its warm-up
        return 0.0
    return min(max((step - first) / (last - first), 0.0), 1.0)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the schedules."""
    return [Cosine, WarmupStableDecay, Constant]
