"""All that one specification asks at one size: the arms at the recipe's values, at values that were
tuned for each of them, and at other lengths of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lswt_core.ablation.document_split import judged_on
from lswt_core.ablation.horizons import AtHorizon, check_horizons, run_horizons, steps_at
from lswt_core.ablation.probe_runs import require_probes
from lswt_core.ablation.runs.outcome import Study
from lswt_core.ablation.runs.runner import Workers
from lswt_core.ablation.runs.store import RunStore
from lswt_core.ablation.sequential import run_sequentially
from lswt_core.ablation.study import Ablation
from lswt_core.ablation.tune import least_runs
from lswt_core.ablation.tuned import (
    Tuner,
    Tuning,
    at_chosen_values,
    build_from,
    check_tuning,
    read_own_value,
)
from lswt_core.errors import UsageError


@dataclass(frozen=True)
class Comparison:
    """The results of ``run_comparison``. With tuning, all losses are those on the held-out
    documents that no value was chosen on.
    """

    fixed: Study  # every arm at its recipe's values
    tuning: Tuning | None = None  # how values were chosen; None: they were not
    tuned: Study | None = None  # every arm at its chosen values, with the seeds of ``fixed``
    # of the headline, ascending, the recipe's own among them; empty: no other length was asked
    horizons: tuple[AtHorizon, ...] = ()

    @property
    def headline(self) -> Study:
        """The study that the verdict is about: the tuned one where there is one."""
        return self.fixed if self.tuned is None else self.tuned

    def studies(self) -> list[Study]:
        """Return all studies, each once."""
        others = [one.study for one in self.horizons if one.multiple != 1.0]
        return [self.fixed, *([] if self.tuned is None else [self.tuned]), *others]


def check_comparison(ablation: Ablation) -> None:
    """Raise UsageError or RecipeError, before anything is trained, for options of a built ablation
    that cannot be tuned, horizons that share no beginning, or probes that there are not.
    """
    if ablation.spec.sequential and ablation.spec.horizons:
        raise UsageError(
            "--sequential: where it stops depends on one length of training, and --horizons asks"
            " for several\n  fix: leave one of them out, or give --seeds in place of --sequential"
        )
    check_tuning(ablation)
    check_horizons(ablation, ablation.spec.horizons)
    require_probes(ablation.spec.probes)


def describe_plan(ablation: Ablation) -> list[str]:
    """Return what is made of a built ablation besides its arms and seeds, a line each."""
    lines = []
    for option in ablation.spec.tune:
        grids = []
        for arm in ablation.arms:
            grid = option.grid(read_own_value(arm, option))
            grids.append(f"{arm.spec.name} {grid[0]:g} .. {grid[-1]:g}")
        runs = least_runs(option.points, ablation.spec.tuning_seeds)
        lines.append(
            f"tuned: {option.key}, {option.points} points a factor of {option.factor:.3g} apart"
            f" ({', '.join(grids)}); {runs} runs of every arm, more where an optimum is at an edge"
        )
    if ablation.spec.horizons:
        multiples = sorted({1.0, *ablation.spec.horizons})
        steps = [f"{steps_at(ablation.arms[0], multiple):,}" for multiple in multiples]
        lines.append(f"lengths of training: {', '.join(steps)} steps, from a shared beginning")
    return lines


def run_comparison(ablation: Ablation, store: RunStore, workers: Workers) -> Comparison:
    """Make all runs that the specification of a built ablation asks for (arms and seeds,
    ``spec.tune``, ``spec.horizons``), and return their results.

    Asked to stop, it prints what is finished and raises RunsStopped; the same call goes on.
    """
    check_comparison(ablation)
    multiples = ablation.spec.horizons
    if not ablation.spec.tune:
        horizons = run_lengths(ablation, store, workers, multiples)
        return Comparison(study_of(horizons), horizons=tuple(horizons if multiples else ()))
    tuning = Tuner(ablation, store, workers).tune()
    best = build_from(ablation, at_chosen_values(ablation, tuning))

    def judge(study: Study) -> Study:
        return judged_on(study, tuning.documents.judging)

    horizons = run_lengths(best, store, workers, multiples, judge)
    ablation.spec = ablation.spec._replace(seeds=best.spec.seeds)  # a sequential study chose them
    fixed = judge(ablation.run(store, workers))
    return Comparison(fixed, tuning, study_of(horizons), tuple(horizons if multiples else ()))


def run_lengths(
    ablation: Ablation,
    store: RunStore,
    workers: Workers,
    multiples: Sequence[float],
    judge: Callable[[Study], Study] = lambda study: study,
) -> list[AtHorizon]:
    """Run a built ablation at all lengths of training, the recipe's own among them, or look by
    look; every study is seen as ``judge`` shows it.
    """
    if ablation.spec.sequential:
        study = run_sequentially(ablation, store, workers, judge)
        return [AtHorizon(1.0, ablation.arms[0].recipe.train.total_steps, study)]
    horizons = run_horizons(ablation, multiples, store, workers)
    return [one._replace(study=judge(one.study)) for one in horizons]


def study_of(horizons: list[AtHorizon]) -> Study:
    """Return the study at the recipe's own length."""
    return next(one.study for one in horizons if one.multiple == 1.0)
