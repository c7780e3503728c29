"""The arms of an ablation at several lengths of training (horizons).

Runs that differ in their length alone are the same up to the step at which the shorter one's
learning rate begins to decay. With a schedule that is constant until then (warm-up-stable-decay,
Hu et al. 2024, arXiv 2404.06395; Haegele et al. 2024, arXiv 2405.18392) all horizons cost about as
much as the longest run and the decays of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lswt_core.ablation.build_arms import AblationSpec, BuiltArm
from lswt_core.ablation.runs.branch import graft, remove_branches, request_branches
from lswt_core.ablation.runs.outcome import Study
from lswt_core.ablation.runs.progress import Job
from lswt_core.ablation.runs.runner import Workers
from lswt_core.ablation.runs.store import RunStore
from lswt_core.ablation.study import Ablation
from lswt_core.ablation.tuned import build_from, derive
from lswt_core.errors import UsageError
from lswt_core.model.components import build_schedule
from lswt_core.recipe import Recipe

LEAST_SHARED = 0.5  # of the shorter run, or horizons would cost as much as separate runs


class AtHorizon(NamedTuple):
    """The arms at one length of training."""

    multiple: float  # of the recipe's steps
    steps: int  # of the baseline
    study: Study


def steps_at(arm: BuiltArm, multiple: float) -> int:
    """Return the number of an arm's steps at a horizon."""
    return max(1, round(multiple * arm.recipe.train.total_steps))


def at_horizon(ablation: Ablation, multiple: float) -> AblationSpec:
    """Return the specification of a built ablation's arms at another length of training."""
    return derive(ablation, lambda arm: (f"train.steps={steps_at(arm, multiple)}",))


def check_horizons(ablation: Ablation, multiples: Sequence[float]) -> None:
    """Raise UsageError if an arm's schedule is not the same at all horizons until it decays."""
    whole = sorted({1.0, *multiples})
    for arm in ablation.arms:
        recipes = [load_at(ablation, arm, multiple) for multiple in whole]
        for recipe in recipes[:-1]:
            steps, shared = recipe.train.total_steps, shared_steps(recipe, recipes[-1])
            if shared < LEAST_SHARED * steps:
                raise UsageError(
                    f"--horizons: with schedule.use = {recipe.one('schedule').name} the learning"
                    f" rates of {steps:,} and {recipes[-1].train.total_steps:,} steps differ from"
                    f' update {shared + 1:,} on in arm "{arm.spec.name}", so that the runs share'
                    " too little\n  fix: a schedule that is constant until it decays:"
                    " schedule.use=wsd, with warm-up and decay_share below a half of the run"
                )


def load_at(ablation: Ablation, arm: BuiltArm, multiple: float) -> Recipe:
    """Return an arm's recipe at a horizon."""
    if multiple == 1.0:
        return arm.recipe
    words = (*arm.overrides, f"train.steps={steps_at(arm, multiple)}")
    return ablation.builder.load(arm.spec, words)


def shared_steps(shorter: Recipe, longer: Recipe) -> int:
    """Return after how many updates, at most, the runs of two recipes that differ in their length
    alone are still the same: as long as their schedules agree, and before the shorter one ends.
    """
    one, other = (build_schedule(recipe, recipe.registry) for recipe in (shorter, longer))
    last = min(recipe.train.total_steps for recipe in (shorter, longer)) - 1
    for step in range(1, last + 1):
        if one.factor(step) != other.factor(step):
            return step - 1
    return last


def run_horizons(
    ablation: Ablation, multiples: Sequence[float], store: RunStore, workers: Workers
) -> list[AtHorizon]:
    """Run the arms of a built ablation at the recipe's length (multiple 1) and at other ones, the
    longest first; return the results by ascending length. Raises RunsStopped if asked to stop.
    """
    check_horizons(ablation, multiples)
    ablations = {
        multiple: ablation
        if multiple == 1.0
        else build_from(ablation, at_horizon(ablation, multiple))
        for multiple in sorted({1.0, *multiples}, reverse=True)
    }
    longest, *shorter = ablations.values()
    trunks = Trunks(longest, shorter, store, workers)
    studies = [longest.run(store, workers)]
    trunks.graft()
    studies += [one.run(store, workers) for one in shorter]
    results = []
    for (multiple, one), study in zip(ablations.items(), studies, strict=True):
        results.append(AtHorizon(multiple, one.arms[0].recipe.train.total_steps, study))
    return results[::-1]


class Trunks:
    """The runs of the longest horizon, which those of shorter ones may go on from."""

    def __init__(
        self, longest: Ablation, shorter: Sequence[Ablation], store: RunStore, workers: Workers
    ) -> None:
        """Ask the longest runs that are still to be made to keep their checkpoints at the steps at
        which shorter ones leave them.
        """
        self.store = store
        self.branches: list[tuple[Job, Job, int]] = []  # longest, shorter, step
        trunks = longest.jobs(store, workers) if shorter else []
        for ablation in shorter:
            for trunk, job in zip(trunks, ablation.jobs(store, workers), strict=True):
                step = shared_steps(job.recipe, trunk.recipe)
                if step and store.outcome(job.key) is None:
                    self.branches.append((trunk, job, step))
                    if store.outcome(trunk.key) is None:
                        request_branches(store.directory(trunk.key), [step])

    def graft(self) -> None:
        """Let shorter runs that are still to be made begin where they leave the longest ones."""
        for trunk, job, step in self.branches:
            directory = self.store.directory(job.key)
            graft(self.store.directory(trunk.key), step, directory, job.recipe)
        for trunk, *_ in self.branches:
            remove_branches(self.store.directory(trunk.key))
