"""Checks of schedules."""

from __future__ import annotations

import torch

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import Subject
from lswt_core.interfaces import Horizon

RUN = Horizon(steps=1000, tokens_per_step=100)


@rule(
    "range",
    ("schedule",),
    why="the learning rate is the peak times this factor",
    mend="return a share between 0 and 1 for steps 1 to horizon.steps",
)
def factors(subject: Subject) -> None:
    """Every factor is a finite share of the peak, which is reached."""
    schedule = subject.make(RUN)
    found = torch.tensor([float(schedule.factor(step)) for step in range(1, RUN.steps + 1)])
    require(found.isfinite().all(), "a factor is not finite")
    require(
        found.min() >= 0 and found.max() <= 1 + 1e-6,
        f"factors lie between {found.min():.3g} and {found.max():.3g}",
    )
    require(found.max() > 0, "all factors are zero")


@rule(
    "pure",
    ("schedule",),
    why="a resumed run asks for step 700 first",
    mend="compute the factor from the step number alone; keep nothing",
    after=("range",),
)
def pure(subject: Subject) -> None:
    """The factor of a step is the same whichever were asked before."""
    one, other = subject.make(RUN), subject.make(RUN)
    forward = {step: one.factor(step) for step in range(1, 101)}
    backward = {step: other.factor(step) for step in range(100, 0, -1)}
    require(forward == backward, "the factor of a step depends on which were asked before")
