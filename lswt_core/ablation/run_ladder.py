"""Makes the runs of an ablation at every rung of a ladder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lswt_core.ablation.ladder import LadderAblation, RungAblation
from lswt_core.ablation.runs.outcome import Outcome, Study
from lswt_core.ablation.runs.progress import Job, format_partial_table
from lswt_core.ablation.runs.runner import Runner, RunsStopped, Workers
from lswt_core.ablation.runs.store import RunStore


@dataclass(frozen=True)
class RungStudy:
    """The results at one rung."""

    name: str
    parameters: int  # of the baseline, without embedding tables
    study: Study


@dataclass(frozen=True)
class LadderStudy:
    """The results of an ablation at every rung of a ladder."""

    name: str
    ladder: str  # its file's name
    rungs: list[RungStudy]  # smallest first
    command: str

    @property
    def top(self) -> Study:
        """The results at the largest rung, which the headline is about."""
        return self.rungs[-1].study

    def studies(self) -> list[Study]:
        """Return the results of all rungs."""
        return [one.study for one in self.rungs]


class LadderStopped(RunsStopped):
    """A ladder was asked to stop; ``ladder`` has what is finished."""

    def __init__(self, stopped: RunsStopped, total: int, ladder: LadderStudy) -> None:
        super().__init__(stopped.outcomes, total)
        self.ladder = ladder


def run_ladder(ablation: LadderAblation, store: RunStore, workers: Workers) -> LadderStudy:
    """Make the runs of a built ablation that are not in the store, and return the results.

    All runs are given out together, the longest first (Graham 1969): with as many devices as runs
    the study takes the time of its longest run. Asked to stop, it prints what is finished and
    raises LadderStopped.
    """
    jobs = {one.name: one.ablation.jobs(workers.threads) for one in ablation.rungs}
    ordered = order_jobs(ablation.rungs, jobs)
    try:
        outcomes = Runner(ordered, store, workers, ablation.say).run()
    except RunsStopped as stopped:
        for name, own in jobs.items():
            ablation.say(f"{name}:\n{format_partial_table(own, stopped.outcomes)}")
        study = collect(ablation, jobs, stopped.outcomes, store, workers)
        raise LadderStopped(stopped, len(ordered), study) from stopped
    return collect(ablation, jobs, outcomes, store, workers)


def order_jobs(rungs: Sequence[RungAblation], jobs: Mapping[str, list[Job]]) -> list[Job]:
    """Return the jobs of all rungs, the most expensive rung first, named by arm and rung."""
    ordered = sorted(rungs, key=lambda one: -one.flops)
    return [
        job._replace(arm=f"{job.arm} at {one.name}") for one in ordered for job in jobs[one.name]
    ]


def collect(
    ablation: LadderAblation,
    jobs: Mapping[str, list[Job]],
    outcomes: Mapping[str, Outcome],
    store: RunStore,
    workers: Workers,
) -> LadderStudy:
    """Return the results of all rungs."""
    rungs = []
    for one in ablation.rungs:
        study = one.ablation.collect(jobs[one.name], outcomes, store, workers)
        rungs.append(RungStudy(one.name, one.parameters, study))
    spec = ablation.spec
    return LadderStudy(spec.name, ablation.ladder.name, rungs, spec.command)
