"""Tunes the options of every arm of an ablation with equal effort, and makes the specification of
the comparison of all arms at their own best values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from lswt_core.ablation.build_arms import AblationSpec, BuiltArm
from lswt_core.ablation.certificate import DATA_KEYS, HELD_OUT_KEYS, INITIALISATION_KEYS
from lswt_core.ablation.document_split import DocumentSplit, loss_on, split_documents
from lswt_core.ablation.recipe_diff import is_covered
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.runs.progress import Job
from lswt_core.ablation.runs.runner import Runner, Workers
from lswt_core.ablation.runs.store import DIVERGED, RunStore
from lswt_core.ablation.study import Ablation
from lswt_core.ablation.tune import ArmSearch, Ask, Found, Values, run_searches
from lswt_core.ablation.tuning_grid import TunedOption
from lswt_core.errors import RecipeError, RunsFailed, UsageError
from lswt_core.recipe import Recipe
from lswt_core.recipe.toml_writer import flat

# The first seed of tuning: far beyond those of any verdict, which start at train.seed.
TUNING_SEEDS = 1 << 30


class TuningRun(NamedTuple):
    """A run that was made to choose a value."""

    ask: Ask
    key: str  # of the store
    loss: float | None  # on the documents for choosing; None: it diverged
    failure: str | None  # how it diverged
    initial_loss: float | None  # of its first training step


class Tuning(NamedTuple):
    """How every arm's values were chosen."""

    options: tuple[TunedOption, ...]
    seeds: tuple[int, ...]
    documents: DocumentSplit
    runs: list[TuningRun]
    found: dict[str, list[Found]]  # by arm; one for each option

    def overrides(self, arm: str) -> tuple[str, ...]:
        """Return an arm's chosen values as overrides of its recipe."""
        return overrides_of_values((one.key, one.value) for one in self.found[arm])


def overrides_of_values(values: Iterable[tuple[str, float]]) -> tuple[str, ...]:
    """Return values as overrides of a recipe."""
    return tuple(f"{key}={value!r}" for key, value in values)


def check_tuning(ablation: Ablation) -> None:
    """Raise UsageError for options of a built ablation that cannot be tuned, and RecipeError for
    points of a grid that are not valid.
    """
    if not ablation.spec.tune:
        return
    seeds = tuning_seeds(ablation)
    for arm in ablation.arms:
        open_search(ablation, arm, seeds)


def open_search(ablation: Ablation, arm: BuiltArm, seeds: Sequence[int]) -> ArmSearch:
    """Return the search of a built arm; raises UsageError or RecipeError."""
    options = ablation.spec.tune
    own = {option.key: read_own_value(arm, option) for option in options}

    def load(values: Values) -> None:
        ablation.builder.load(arm.spec, (*arm.overrides, *overrides_of_values(values)))

    def accepts(values: Values) -> bool:
        try:
            load(values)
        except RecipeError:
            return False
        return True

    for option in options:
        for value in option.grid(own[option.key]):
            load(((option.key, value),))
    return ArmSearch(arm.spec.name, options, own, seeds, accepts)


class Tuner:
    """Makes the runs that the searches of a built ablation's arms ask for."""

    def __init__(self, ablation: Ablation, store: RunStore, workers: Workers) -> None:
        self.ablation, self.store, self.workers = ablation, store, workers
        self.arms = {arm.spec.name: arm for arm in ablation.arms}
        self.make_job = ablation.job_maker(store, workers)
        self.documents: DocumentSplit | None = None  # None: no run has finished yet
        self.runs: list[TuningRun] = []

    def tune(self) -> Tuning:
        """Choose every arm's values. Raises UsageError for options that cannot be tuned, and for a
        held-out text that cannot be split; RunsFailed for runs that are lost; RunsStopped if asked
        to stop.
        """
        searches = self.open_searches()
        # The first run shows which documents are held out, before all others are made.
        self.evaluate(searches[0].wanted()[:1])
        run_searches(searches, self.evaluate)
        return self.result(searches)

    def open_searches(self) -> list[ArmSearch]:
        """Return the searches of all arms; raises UsageError or RecipeError."""
        seeds = tuning_seeds(self.ablation)
        return [open_search(self.ablation, arm, seeds) for arm in self.ablation.arms]

    def result(self, searches: Sequence[ArmSearch]) -> Tuning:
        """Return what searches that have ended came to."""
        documents = self.documents or DocumentSplit(frozenset(), frozenset())
        found = {search.arm: search.found for search in searches}
        seeds = tuple(tuning_seeds(self.ablation))
        return Tuning(self.ablation.spec.tune, seeds, documents, self.runs, found)

    def evaluate(self, asked: list[Ask]) -> list[float]:
        """Make some runs, and return their losses on the documents for choosing; inf: diverged.
        Raises RunsFailed if runs failed otherwise: nothing could be chosen without them.
        """
        jobs = [self.job(ask) for ask in asked]
        outcomes = Runner(jobs, self.store, self.workers, self.ablation.say).run()
        return self.take(asked, jobs, outcomes)

    def take(
        self, asked: Sequence[Ask], jobs: Sequence[Job], outcomes: Mapping[str, Outcome]
    ) -> list[float]:
        """Record the outcomes of runs that were asked for; return their losses, inf: diverged."""
        require_results(jobs, outcomes)
        runs = [
            self.read(ask, job.key, outcomes[job.key]) for ask, job in zip(asked, jobs, strict=True)
        ]
        known = {run.key for run in self.runs}
        self.runs += [run for run in runs if run.key not in known]
        return [math.inf if run.loss is None else run.loss for run in runs]

    def job(self, ask: Ask) -> Job:
        """Return the run that was asked for."""
        return self.make_job(self.arms[ask.arm], ask.seed, overrides_of_values(ask.values))

    def read(self, ask: Ask, key: str, outcome: Outcome) -> TuningRun:
        """Return what a run came to."""
        if outcome.failure is None and self.documents is None:
            self.documents = split_documents(name for name, *_ in outcome.documents)
        loss = None
        if outcome.failure is None and self.documents is not None:
            loss = loss_on(outcome, self.documents.choosing)
        initial = outcome.curve[0][1] if outcome.curve else None
        return TuningRun(ask, key, loss, outcome.failure, initial)


def require_results(jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> None:
    """Raise RunsFailed if runs neither finished nor diverged."""
    lost = []
    for job in jobs:
        failure = outcomes[job.key].failure
        if failure is not None and not failure.startswith(DIVERGED):
            lost.append(f"  {job}: {failure}")
    if lost:
        raise RunsFailed(
            "runs of tuning failed, and no value can be chosen without them:\n"
            + "\n".join(lost)
            + "\n  fix: the same command makes them again; or a narrower range of --tune"
        )


def tuning_seeds(ablation: Ablation) -> range:
    """Return the seeds of tuning; raises UsageError if the verdict's reach them."""
    if ablation.seeds().stop > TUNING_SEEDS:
        raise UsageError(
            f"--tune: train.seed = {ablation.seeds().start} leads to seeds of tuning, which begin"
            f" at {TUNING_SEEDS:,}\n  fix: a smaller train.seed"
        )
    return range(TUNING_SEEDS, TUNING_SEEDS + ablation.spec.tuning_seeds)


def read_own_value(arm: BuiltArm, option: TunedOption) -> float:
    """Return the value of an option in an arm's recipe; raises UsageError if it has none, or none
    that can be tuned.
    """
    key, name = option.key, arm.spec.name
    value = flat(arm.recipe.resolved()).get(key)
    why = ""
    if is_covered(key, (*DATA_KEYS, *HELD_OUT_KEYS)):
        why = "it decides what is trained or measured on, for which all arms are alike"
    elif key in arm.axes:
        why = f'the swap of arm "{name}" is about it'
    elif value is None:
        why = f'arm "{name}" has no such value'
    elif not isinstance(value, float):
        why = f'it is {value!r} in arm "{name}", and real numbers alone are tuned'
    elif value <= 0 and option.low is None:
        why = (
            f'it is {value:g} in arm "{name}", around which there is no logarithmic grid; give a'
            f" range, e.g. --tune {key}=0.01..0.1/{option.points}"
        )
    if why:
        fix = "tune an option that every arm has; for other values: one arm each, --swap KEY=VALUE"
        raise UsageError(f"--tune cannot tune {key}: {why}\n  fix: {fix}")
    assert isinstance(value, float)
    return value


def derive(ablation: Ablation, overrides: Callable[[BuiltArm], Sequence[str]]) -> AblationSpec:
    """Return the specification of a built ablation's arms with further overrides. Sizes that were
    matched stay as they are, and so do the axes.
    """
    arms = []
    for arm in ablation.arms:
        words = (*arm.overrides, *overrides(arm))
        arms.append(arm.spec._replace(overrides=words, axes=arm.axes))
    return ablation.spec._replace(arms=arms, match="none", tune=(), horizons=())


def at_chosen_values(ablation: Ablation, tuning: Tuning) -> AblationSpec:
    """Return the specification of the arms at their chosen values, of a built ablation that may
    have other sizes than the one that was tuned: with ``parametrisation = "mup"`` learning rates
    carry over (Yang et al. 2022, arXiv 2203.03466).

    Arms may differ from the baseline in the tuned keys, since all were chosen by one procedure;
    in nothing else besides their axes. Raises UsageError for an arm that was not tuned.
    """
    missing = [arm.spec.name for arm in ablation.arms if arm.spec.name not in tuning.found]
    if missing:
        raise UsageError(f"no values were tuned for {', '.join(missing)}: tune these arms too")
    keys = [option.key for option in tuning.options]
    allowed = [*keys]
    if any(is_covered(key, INITIALISATION_KEYS) for key in keys):
        allowed.append("initialisation")
    spec = derive(ablation, lambda arm: tuning.overrides(arm.spec.name))
    return spec._replace(allow=[*spec.allow, *allowed])


def build_from(ablation: Ablation, spec: AblationSpec) -> Ablation:
    """Return a built ablation of another specification, on the same machine."""
    other = Ablation(spec, ablation.registry, ablation.world, ablation.say)
    first = spec.arms[0]
    recipe = Recipe.load(
        first.path, first.overrides, overlay=spec.overlay, registry=ablation.registry
    )
    other.build(recipe)
    return other
