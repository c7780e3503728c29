"""Learning-rate schedules: the family's warm-up and cosine, warm-up-stable-decay, and a constant."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Horizon, Schedule


class Cosine(Schedule):
    """Linear warm-up, then half a cosine that starts where the warm-up ends and reaches ``floor``
    where the run ends, to the token.

    The family counts both in tokens; a step always being as many tokens, they cancel. A run that
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
        cooled = _progress(step, self.warmup_steps, self.horizon.end)
        cosine = (math.cos(math.pi * cooled) / 2 + 0.5) * (1 - self.floor) + self.floor
        return min(_warmth(step, self.warmup_steps), cosine)


class WarmupStableDecay(Schedule):
    """Linear warm-up, full rate, then decay to ``floor`` over the last ``decay_share`` of the run
    (Hu et al. 2024, arXiv 2404.06395).

    The shape "1-sqrt" falls fast at first (Hägele et al. 2024, arXiv 2405.18392).
    """

    name = "wsd"
    citation = """@inproceedings{hu2024minicpm,
  title = {MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies},
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
        decayed = _progress(step, self.decay_from, self.horizon.steps)
        if self.shape == "1-sqrt":
            decayed = math.sqrt(decayed)
        return min(_warmth(step, self.warmup_steps), 1 - (1 - self.floor) * decayed)


class Constant(Schedule):
    """The peak rate all along, after an optional linear warm-up."""

    name = "constant"

    def __init__(self, horizon: Horizon, *, warmup_steps: Annotated[int, Ge(0)] = 0) -> None:
        super().__init__(horizon)
        self.warmup_steps = warmup_steps

    def factor(self, step: int) -> float:
        """1, or less while warming up."""
        return _warmth(step, self.warmup_steps)


def _warmth(step: int, warmup_steps: int) -> float:
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def _progress(step: int, first: int, last: float) -> float:
    if last <= first:  # the run ends within its warm-up: what would follow never begins
        return 0.0
    return min(max((step - first) / (last - first), 0.0), 1.0)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the schedules."""
    return [Cosine, WarmupStableDecay, Constant]
