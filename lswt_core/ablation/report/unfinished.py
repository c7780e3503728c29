"""The report of a study that was stopped: what is there and what is missing, without verdicts.

A test after an arbitrary number of seeds would not hold its level.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lswt_core.ablation.runs.outcome import Study

NOT_FINISHED = "not finished"
# keys of a comparison that need not all seeds
KEPT = {
    *("arm", "baseline", "seeds", "lost", "failed", "margin", "looks", "costs"),
    *("delta", "values", "correlation", "means"),
}


def list_unfinished(study: Study) -> list[dict[str, Any]]:
    """Return the seeds of every arm whose runs are not finished, of arms that have any."""
    seeds = {arm.name: arm.unfinished_seeds() for arm in study.arms}
    return [{"arm": name, "seeds": missing} for name, missing in seeds.items() if missing]


def withhold_verdicts(comparisons: Iterable[dict[str, Any]]) -> None:
    """Take tests, intervals and verdicts out of comparisons; means and seeds stay."""
    for one in comparisons:
        one.update(dict.fromkeys(one.keys() - KEPT))
        one["unknown"] = {}
        one["verdict"] = NOT_FINISHED
        one["why"] = f"{one['seeds']} of {one['seeds'] + one['lost']} pairs of runs are there"


def describe_unfinished(report: dict[str, Any]) -> list[str]:
    """Return a sentence about what is missing; none if nothing is."""
    missing = report["unfinished"]
    if not missing:
        return []
    names = "; ".join(f"{one['arm']}: {', '.join(map(str, one['seeds']))}" for one in missing)
    return [
        "NOT FINISHED: the study was stopped, and there is no verdict. The same command continues"
        f" it. Seeds without a finished run: {names}."
    ]
