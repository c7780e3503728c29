"""Tunes an ablation's arms on a ladder: at every rung, all side by side; or, with
``parametrisation = "mup"``, at the smallest rung, from which values carry over to larger ones
(Yang et al. 2022, arXiv 2203.03466), which is checked at the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lswt_core.ablation.carry import Neighbour, check_carried
from lswt_core.ablation.ladder import LadderAblation, RungAblation
from lswt_core.ablation.runs.progress import Job
from lswt_core.ablation.runs.runner import Runner, Workers
from lswt_core.ablation.runs.store import RunStore
from lswt_core.ablation.study import Ablation
from lswt_core.ablation.tune import Ask
from lswt_core.ablation.tuned import Tuner, Tuning, at_chosen_values, build_from

CARRIES = "mup"  # the parametrisation under which tuned values carry over


class LadderTuning(NamedTuple):
    """How values were chosen at every rung."""

    by_rung: dict[str, Tuning]
    # of carried values, at the largest rung; None: nothing was carried over
    checks: list[Neighbour] | None


def tune_ladder(
    ablation: LadderAblation, store: RunStore, workers: Workers
) -> tuple[LadderTuning, dict[str, Ablation]]:
    """Choose every arm's values at every rung; return how, and the built ablations at these values
    by rung. Raises UsageError, RecipeError or RunsStopped.
    """
    rungs = ablation.rungs
    if not carries_over(ablation):
        tunings = tune_rungs({one.name: one.ablation for one in rungs}, store, workers)
        return LadderTuning(tunings, None), {one.name: at_best(one, tunings) for one in rungs}
    smallest = tune_rungs({rungs[0].name: rungs[0].ablation}, store, workers)[rungs[0].name]
    tunings = {one.name: smallest for one in rungs}
    best = {one.name: at_best(one, tunings) for one in rungs}
    checks = check_carried(rungs[-1].ablation, smallest, store, workers)
    return LadderTuning(tunings, checks), best


def carries_over(ablation: LadderAblation) -> bool:
    """Whether every arm has the parametrisation under which tuned values carry over."""
    names = {arm.recipe.one("parametrisation").name for arm in ablation.arms}
    return names == {CARRIES}


def at_best(one: RungAblation, tunings: Mapping[str, Tuning]) -> Ablation:
    """Return a rung's built ablation at the values that were chosen for it."""
    return build_from(one.ablation, at_chosen_values(one.ablation, tunings[one.name]))


def tune_rungs(
    ablations: Mapping[str, Ablation], store: RunStore, workers: Workers
) -> dict[str, Tuning]:
    """Choose every arm's values at every rung, with the runs of all rungs given out together."""
    tuners = {name: Tuner(one, store, workers) for name, one in ablations.items()}
    searches = {name: tuner.open_searches() for name, tuner in tuners.items()}
    # The first run of each rung shows which documents are held out, before all others are made.
    first = {name: own[0].wanted()[:1] for name, own in searches.items()}
    evaluate(tuners, first)
    while any(
        wanted := {
            name: [ask for search in own for ask in search.wanted()]
            for name, own in searches.items()
        }.values()
    ):
        asked = dict(zip(searches, wanted, strict=True))
        losses = evaluate(tuners, asked)
        for name, own in searches.items():
            known = dict(zip(asked[name], losses[name], strict=True))
            for search in own:
                for ask in search.wanted():
                    search.record(ask, known[ask])
    return {name: tuner.result(searches[name]) for name, tuner in tuners.items()}


def evaluate(tuners: Mapping[str, Tuner], asked: Mapping[str, list[Ask]]) -> dict[str, list[float]]:
    """Make the runs that rungs ask for, those of the last (the largest) first; return their losses
    by rung.
    """
    jobs = {name: [tuners[name].job(ask) for ask in asked[name]] for name in tuners}
    named: list[Job] = []
    for name in reversed(list(jobs)):
        named += [job._replace(arm=f"{job.arm} at {name}") for job in jobs[name]]
    one = next(iter(tuners.values()))
    outcomes = Runner(named, one.store, one.workers, one.ablation.say).run()
    return {name: tuners[name].take(asked[name], jobs[name], outcomes) for name in tuners}
