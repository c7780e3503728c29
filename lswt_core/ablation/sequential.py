"""A sequential study: seeds are added look by look until every arm is decided, or hopeless."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lswt_core.ablation.report.compare import make_report
from lswt_core.ablation.report.verdict import BETTER, EQUIVALENT, FAILED, WORSE
from lswt_core.ablation.runs.outcome import Study
from lswt_core.ablation.runs.runner import Workers
from lswt_core.ablation.runs.store import RunStore
from lswt_core.ablation.statistics.futility import Interim, equivalent_chance, resolved_chance
from lswt_core.ablation.statistics.looks import nominal_level
from lswt_core.ablation.study import Ablation

DECIDED = (BETTER, WORSE, EQUIVALENT, FAILED)
HOPELESS = 0.1  # conditional power below which more seeds are not worth their cost


def run_sequentially(
    ablation: Ablation,
    store: RunStore,
    workers: Workers,
    judge: Callable[[Study], Study] = lambda study: study,
) -> Study:
    """Make the runs of one planned look after the other, and return the study at the look at which
    no arm is open any more, or at the last; studies are seen as ``judge`` shows them.
    """
    *looks, last = ablation.spec.planned_looks
    for seeds in looks:
        study = judge(run_look(ablation, seeds, store, workers))
        states = {one["arm"]: state(one, last) for one in make_report(study)["comparisons"]}
        told = "; ".join(f"{arm} {words}" for arm, words in states.items())
        ablation.say(f"look at {seeds} of at most {last} seeds: {told}")
        if "open" not in states.values():
            notes = [
                *study.settings["notes"],
                f"Stopped at {seeds} of at most {last} seeds: {told}",
            ]
            return replace(study, settings={**study.settings, "notes": notes})
    return judge(run_look(ablation, last, store, workers))


def run_look(ablation: Ablation, seeds: int, store: RunStore, workers: Workers) -> Study:
    """Return the study with some number of seeds."""
    ablation.spec = ablation.spec._replace(seeds=seeds)
    return ablation.run(store, workers)


def state(one: dict[str, Any], last: int) -> str:
    """Return how an arm stands: its verdict, if that ends its comparison, "open", or why more seeds
    would be in vain.
    """
    if one["verdict"] in DECIDED:
        return str(one["verdict"])
    if not one["std"] or one["alpha"] is None or one["alpha_equivalent"] is None:
        return "open"
    chance = conditional_power(one, last)
    if chance >= HOPELESS:
        return "open"
    return f"hopeless (at {last} seeds it would be decided with a chance of {chance:.0%})"


def conditional_power(one: dict[str, Any], last: int) -> float:
    """Return the greater of the probabilities that the last look resolves a difference as large as
    the margin, in the direction seen so far, and that it shows equivalence where there is none.
    """
    declared, margin = tuple(one["looks"]["declared"]), one["margin"]
    interim = Interim(one["delta"], one["std"], one["seeds"], max(last, one["seeds"]))
    level = nominal_level(one["alpha"], declared, interim.last)
    level_equivalent = nominal_level(one["alpha_equivalent"], declared, interim.last, sides=1)
    return max(
        resolved_chance(interim, math.copysign(margin, one["delta"]), level),
        equivalent_chance(interim, margin, level_equivalent),
    )
