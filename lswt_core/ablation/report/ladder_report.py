"""The report of an ablation on a ladder as plain data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lswt_core.ablation.report.comparison_report import headline_report, make_comparison_report
from lswt_core.ablation.report.costs import share_machine
from lswt_core.ablation.report.ladder_verdict import add_ladder_verdicts
from lswt_core.ablation.report.unfinished import NOT_FINISHED
from lswt_core.ablation.run_ladder import LadderStudy, RungStudy
from lswt_core.ablation.runs.outcome import ArmResult, Outcome
from lswt_core.ablation.statistics.ladder_pair import Pair, analyse_pair

ANALYSED = ("law", "speedup", "trend", "next", "back_test")  # None where it cannot be computed


def make_ladder_report(study: LadderStudy) -> dict[str, Any]:
    """Return the report of the largest rung (``comparison_report.headline_report``) with another
    name, and "ladder":

    "name" of the ladder; "rate": key, exponent, at (its rule; None: it has none); "rungs", smallest
    first: name, parameters (of the baseline, without embedding tables), tokens, steps,
    training_flops (of the baseline), report (the rung's own); "arms": arm, comparisons (those of
    every rung's report with the baseline), verdict (persists, shrinks, grows, changes sign,
    equivalent, not resolved), why, seeds (at which both finished at every rung), law, speedup,
    trend, next, back_test (see ``ladder_pair.analyse_pair``) and "unknown": what could not be
    computed, and why;
    "carried": where values were tuned at the smallest rung alone, how those beside them do at the
    largest (see ``carry.Neighbour``), else None.
    """
    rungs = [describe_rung(one) for one in study.rungs]
    names = [arm.name for arm in study.top.arms[1:]]
    arms = [analyse_arm(study, rungs, number) for number in range(1, len(names) + 1)]
    add_ladder_verdicts(arms)
    top = rungs[-1]["report"]
    if any(one["report"]["unfinished"] for one in rungs):
        for arm in arms:
            withhold(arm)
    return {
        **top,
        "name": f"{study.name} on the ladder {study.ladder}",
        "ladder": {
            "name": study.ladder,
            "rate": study.rate,
            "rungs": rungs,
            "arms": arms,
            "carried": carried(study),
        },
    }


def carried(study: LadderStudy) -> list[dict[str, Any]] | None:
    """Return the checks of values that were carried from the smallest rung; None if none were."""
    if study.tuning is None or study.tuning.checks is None:
        return None
    return [one._asdict() for one in study.tuning.checks]


def describe_rung(one: RungStudy) -> dict[str, Any]:
    """Return the entry of a rung."""
    baseline = one.study.arms[0]
    return {
        "name": one.name,
        "parameters": one.parameters,
        "tokens": baseline.tokens,
        "steps": one.study.settings["steps"],
        "training_flops": baseline.training_flops,
        "report": headline_report(make_comparison_report(one.comparison)),
    }


def analyse_arm(study: LadderStudy, rungs: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """Return the entry of an arm, still without a verdict."""
    entry: dict[str, Any] = {
        "arm": study.top.arms[number].name,
        "comparisons": [one["report"]["comparisons"][number - 1] for one in rungs],
        "seeds": 0,
        **dict.fromkeys(ANALYSED),
        "lower": None,  # without the largest rung, for the back-test's verdict
        "unknown": {},
    }
    sides = [(one.study.arms[0], one.study.arms[number]) for one in study.rungs]
    try:
        pair = pair_of(sides)
        entry |= analyse_pair(pair)
        if pair.flops.shape[1] > 2:
            entry["lower"] = analyse_pair(pair.without_top())
    except Exception as error:  # the runs are made: no statistic may cost their report
        entry["unknown"]["speedup"] = f"{error}"
    return entry


def pair_of(sides: list[tuple[ArmResult, ArmResult]]) -> Pair:
    """Return the losses, FLOPs and speeds of baseline and arm at every rung. Raises ValueError with
    what is missing.
    """
    costs = [[one.training_flops or math.nan for one in pair] for pair in sides]
    flops = np.array(costs, dtype=np.float64).T  # [2, rungs]
    if np.isnan(flops).any():
        raise ValueError("the FLOPs of a training are unknown")
    finished = [pair_by_seed(*pair) for pair in sides]
    seeds = sorted(set.intersection(*(set(one) for one in finished)))
    if not seeds:
        raise ValueError("there is no seed at which baseline and arm finished at every rung")
    losses, speeds = [], []
    for seed in seeds:
        pairs = [one[seed] for one in finished]  # by rung
        losses.append([[pair[side].loss or math.nan for pair in pairs] for side in (0, 1)])
        speeds.append([log_ratio(*pair) for pair in pairs])
    return Pair(np.array(losses), flops, np.array(speeds))


def pair_by_seed(baseline: ArmResult, arm: ArmResult) -> dict[int, tuple[Outcome, Outcome]]:
    """Return the finished pairs of runs by seed."""
    return {one.seed: (one, other) for one, other in arm.finished_pairs(baseline)}


def log_ratio(baseline: Outcome, arm: Outcome) -> float:
    """Return ln of the arm's tokens per second over the baseline's; NaN if unknown, or measured
    while runs shared the machine.
    """
    if share_machine([(baseline, arm)]):
        return math.nan
    if not baseline.tokens_per_second or not arm.tokens_per_second:
        return math.nan
    return math.log(arm.tokens_per_second / baseline.tokens_per_second)


def withhold(arm: dict[str, Any]) -> None:
    """Take what needs all runs out of an arm's entry: a study that was stopped has no verdict."""
    arm.update(dict.fromkeys(ANALYSED))
    arm["verdict"], arm["why"] = NOT_FINISHED, "runs are missing"
