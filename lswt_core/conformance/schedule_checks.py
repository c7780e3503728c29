"""Checks of learning-rate schedules."""

from __future__ import annotations

import re
from unittest import SkipTest

import torch

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import Subject
from lswt_core.interfaces import Horizon

HORIZON = Horizon(steps=1000, tokens_per_step=100)
LONG_HORIZON = Horizon(steps=20_000, tokens_per_step=100)  # longer than any default warm-up
# options that say where a schedule ends
FLOORS = re.compile(r"floor|final|(^|_)(min|minimum|end)(_|$)")


@rule(
    "range",
    ("schedule",),
    why="the learning rate is its peak times this factor",
    fix="return a number between 0 and 1 for steps 1 to horizon.steps",
    after=("interface",),
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


@rule(
    "peak",
    ("schedule",),
    why="the optimizer's `lr` is the peak learning rate: a tuned value means something else if no"
    " step has it",
    fix="let the factor be 1 at some step, usually the last of the warm-up",
    after=("range",),
)
def reaches_the_peak(subject: Subject) -> None:
    """In a long run some step has the factor 1."""
    schedule = subject.build(LONG_HORIZON)
    highest = max(schedule.factor(step) for step in range(1, LONG_HORIZON.steps + 1))
    require(highest >= 0.995, f"the largest factor of {LONG_HORIZON.steps} steps is {highest:.3g}")


@rule(
    "floor",
    ("schedule",),
    why="a learning rate that ends above its floor leaves the model less trained than it says",
    fix="let the last step, horizon.steps, have the lowest factor",
    after=("range",),
)
def reaches_the_floor(subject: Subject) -> None:
    """In a long run the last step has the factor that an option ``floor``, ``final``, ``min`` or
    ``end`` of 0.5 names.
    """
    names = [
        option.name
        for option in subject.offer.options
        if FLOORS.search(option.name) and isinstance(option.default, float)
    ]
    if not names:
        raise SkipTest("no option names the factor of the last step")
    for name in names:
        schedule = subject.with_options({name: 0.5}).build(LONG_HORIZON)
        last = schedule.factor(LONG_HORIZON.steps)
        require(last <= 0.505, f"with {name} = 0.5 the last of 20,000 steps has factor {last:.3g}")
