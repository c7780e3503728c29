"""Checks of learning-rate schedules."""

from __future__ import annotations

import torch

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import Subject
from lswt_core.interfaces import Horizon

HORIZON = Horizon(steps=1000, tokens_per_step=100)


@rule(
    "range",
    ("schedule",),
    why="the learning rate is its peak times this factor",
    fix="return a number between 0 and 1 for steps 1 to horizon.steps",
)
def factors_are_shares(subject: Subject) -> None:
    """Every factor is finite and between 0 and 1, and not all are 0."""
    schedule = subject.build(HORIZON)
    factors = torch.tensor([float(schedule.factor(step)) for step in range(1, HORIZON.steps + 1)])
    require(factors.isfinite().all(), "a factor is not finite")
    lowest, highest = float(factors.min()), float(factors.max())
    require(
        lowest >= 0 and highest <= 1 + 1e-6,
        f"factors lie between {lowest:.3g} and {highest:.3g}",
    )
    require(highest > 0, "all factors are zero")


@rule(
    "stateless",
    ("schedule",),
    why="a run that resumes at step 700 asks for that step first",
    fix="compute the factor from the step number alone",
    after=("range",),
)
def factor_depends_on_the_step_alone(subject: Subject) -> None:
    """The factor of a step does not depend on earlier calls."""
    schedule, other = subject.build(HORIZON), subject.build(HORIZON)
    ascending = {step: schedule.factor(step) for step in range(1, 101)}
    descending = {step: other.factor(step) for step in range(100, 0, -1)}
    require(ascending == descending, "the factor of a step depends on earlier calls")
