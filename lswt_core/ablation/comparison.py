"""All that one specification asks at one size: the arms at the recipe's values, at values that were
tuned for each of them, and at other lengths of training.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lswt_core.ablation.runs.outcome import Study
from lswt_core.ablation.runs.runner import Workers
from lswt_core.ablation.runs.store import RunStore
from lswt_core.ablation.study import Ablation


class AtHorizon(NamedTuple):
    """The arms at one length of training."""

    multiple: float  # of the recipe's steps
    steps: int  # of the baseline
    study: Study


class Comparison(NamedTuple):
    """The results of ``run_comparison``."""

    fixed: Study  # every arm at its recipe's values
    tuning: Any | None = None  # ``tuned.Tuning``: how values were chosen; None: they were not
    tuned: Study | None = None  # every arm at its chosen values, with the seeds of ``fixed``
    horizons: tuple[AtHorizon, ...] = ()  # ascending; empty: only the recipe's length was asked

    @property
    def headline(self) -> Study:
        """The study that the verdict is about: the tuned one where there is one."""
        return self.fixed if self.tuned is None else self.tuned


def run_comparison(ablation: Ablation, store: RunStore, workers: Workers) -> Comparison:
    """Make all runs that the specification of a built ablation asks for (arms and seeds,
    ``spec.tune``, ``spec.horizons``), and return their results.

    Asked to stop, it prints what is finished and raises RunsStopped; the same call goes on.
    """
    return Comparison(ablation.run(store, workers))
