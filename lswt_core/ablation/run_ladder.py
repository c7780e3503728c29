"""Makes the runs of an ablation at every rung of a ladder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lswt_core.ablation.comparison import Comparison
from lswt_core.ablation.document_split import judged_on
from lswt_core.ablation.ladder import LadderAblation, RungAblation
from lswt_core.ablation.ladder_tuning import LadderTuning, tune_ladder
from lswt_core.ablation.runs.outcome import Outcome, Study
from lswt_core.ablation.runs.progress import Job, format_partial_table
from lswt_core.ablation.runs.runner import Runner, RunsStopped, Workers
from lswt_core.ablation.runs.store import RunStore
from lswt_core.ablation.study import Ablation

Jobs = Mapping[str, list[Job]]  # by rung


@dataclass(frozen=True)
class RungStudy:
    """The results at one rung."""

    name: str
    parameters: int  # of the baseline, without embedding tables
    comparison: Comparison

    @property
    def study(self) -> Study:
        """The study that verdicts are about: the tuned one where there is one."""
        return self.comparison.headline


@dataclass(frozen=True)
class LadderStudy:
    """The results of an ablation at every rung of a ladder."""

    name: str
    ladder: str  # its file's name
    rungs: list[RungStudy]  # smallest first
    rate: dict[str, Any] | None  # the ladder's rule (``ladder_file.RateTable``), if it has one
    tuning: LadderTuning | None  # None: arms have their recipes' values, by the ladder's rule

    @property
    def top(self) -> Study:
        """The results at the largest rung, which the headline is about."""
        return self.rungs[-1].study

    def studies(self) -> list[Study]:
        """Return the results of all rungs."""
        return [study for one in self.rungs for study in one.comparison.studies()]


class LadderStopped(RunsStopped):
    """A ladder was asked to stop; ``ladder`` has what is finished."""

    def __init__(self, stopped: RunsStopped, total: int, ladder: LadderStudy) -> None:
        super().__init__(stopped.outcomes, total)
        self.ladder = ladder


def run_ladder(ablation: LadderAblation, store: RunStore, workers: Workers) -> LadderStudy:
    """Make the runs of a built ablation that are not in the store, and return the results.

    All runs are given out together, the longest first (Graham 1969): with as many devices as runs
    the study takes the time of its longest run, and tuning that of one more for each of its rounds.
    Asked to stop, it prints what is finished and raises RunsStopped; LadderStopped, which has the
    results so far, after tuning.
    """
    tuning, best = None, dict[str, Ablation]()
    if ablation.spec.tune:
        tuning, best = tune_ladder(ablation, store, workers)
    runs = LadderRuns(ablation, store, workers, tuning, best)
    try:
        outcomes = Runner(runs.ordered(), store, workers, ablation.say).run()
    except RunsStopped as stopped:
        for name, jobs in (runs.tuned or runs.fixed).items():
            ablation.say(f"{name}:\n{format_partial_table(jobs, stopped.outcomes)}")
        total = len({job.key for job in runs.ordered()})
        raise LadderStopped(stopped, total, runs.collect(stopped.outcomes)) from stopped
    return runs.collect(outcomes)


class LadderRuns:
    """The runs of all rungs: at recipes' values, and at tuned ones where there are any."""

    def __init__(
        self,
        ablation: LadderAblation,
        store: RunStore,
        workers: Workers,
        tuning: LadderTuning | None = None,
        best: Mapping[str, Ablation] | None = None,
    ) -> None:
        """``best``: the built ablations at tuned values, by rung."""
        self.ablation, self.store, self.workers = ablation, store, workers
        self.tuning, self.best = tuning, best or {}
        self.fixed = self.declared({one.name: one.ablation for one in ablation.rungs})
        self.tuned = self.declared(self.best)

    def declared(self, ablations: Mapping[str, Ablation]) -> Jobs:
        """Return the runs of ablations by rung; looks at them are declared."""
        jobs = {}
        for name, one in ablations.items():
            jobs[name] = one.jobs(self.store, self.workers)
            one.looks(self.store, self.workers).declare(jobs[name])
        return jobs

    def ordered(self) -> list[Job]:
        """Return all runs, the most expensive rung first, named by arm and rung."""
        ordered = []
        for one in sorted(self.ablation.rungs, key=lambda one: -one.flops):
            own = [*self.tuned.get(one.name, ()), *self.fixed[one.name]]
            ordered += [job._replace(arm=f"{job.arm} at {one.name}") for job in own]
        return ordered

    def collect(self, outcomes: Mapping[str, Outcome]) -> LadderStudy:
        """Return the results of all rungs; runs that have no outcome (by key) are not finished."""
        rungs = [self.collect_rung(one, outcomes) for one in self.ablation.rungs]
        name, ladder = self.ablation.spec.name, self.ablation.ladder.name
        rate = self.ablation.ladder.rate
        rule = None if rate is None else rate.model_dump()
        return LadderStudy(name, ladder, rungs, rule, self.tuning)

    def collect_rung(self, one: RungAblation, outcomes: Mapping[str, Outcome]) -> RungStudy:
        """Return the results of a rung."""
        name, places = one.name, (self.store, self.workers)
        fixed = one.ablation.collect(self.fixed[name], outcomes, *places)
        if self.tuning is None:
            return RungStudy(name, one.parameters, Comparison(fixed))
        tuned = self.best[name].collect(self.tuned[name], outcomes, *places)
        tuning = self.tuning.by_rung[name]
        judging = tuning.documents.judging
        both = Comparison(judged_on(fixed, judging), tuning, judged_on(tuned, judging))
        return RungStudy(name, one.parameters, both)
