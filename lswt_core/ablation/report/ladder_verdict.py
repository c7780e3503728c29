"""The verdict about an arm over sizes: does its difference persist, shrink or grow?"""

from __future__ import annotations

import math
from typing import Any

from lswt_core.ablation.report.verdict import ALPHA, BETTER, EQUIVALENT, UNRESOLVED, WORSE
from lswt_core.ablation.statistics.paired_runs import adjust_holm

PERSISTS, SHRINKS, GROWS = "persists", "shrinks", "grows"


def add_ladder_verdicts(arms: list[dict[str, Any]]) -> None:
    """Add "verdict", "why" and the trend's "p_holm" (over all arms) to every arm of a ladder's
    report, and to what its back-test would have said.
    """
    p_holm = adjust_holm([one["trend"] and one["trend"]["p"] for one in arms])
    for one, p in zip(arms, p_holm, strict=True):
        if one["trend"] is not None:
            one["trend"]["p_holm"] = p
        comparisons = one["comparisons"]
        one["verdict"], one["why"] = judge_ladder(comparisons, one["trend"], p)
        before, lower = one["back_test"], one.pop("lower")
        if before is not None and lower is not None:
            p_lower = lower["trend"]["p"]
            verdict, _ = judge_ladder(comparisons[:-1], lower["trend"], p_lower)
            before["verdict"], before["same_verdict"] = verdict, verdict == one["verdict"]


def judge_ladder(
    comparisons: list[dict[str, Any]], trend: dict[str, Any] | None, p: float | None
) -> tuple[str, str]:
    """Return the verdict, and why. ``comparisons`` with the baseline are ordered by size.

    Equivalent: within the margin at every size. Shrinks or grows: what the arm's difference is
    worth in compute changes with size, at the 5 % level, and is less or more at the largest than at
    the smallest. Persists: the difference is resolved at the largest size, and the line through all
    sizes, one rung beyond, has the same sign with its whole 95 % interval. The yardstick is compute
    and not nats: a constant saving is fewer nats the nearer losses are to L_inf.
    """
    verdicts = [one["verdict"] for one in comparisons]
    if all(verdict == EQUIVALENT for verdict in verdicts):
        return EQUIVALENT, f"within {comparisons[-1]['margin']:g} nats at every size"
    failed = [one for one in comparisons if one["failed"]["arm"] > one["failed"]["baseline"]]
    if failed:
        runs = sum(one["failed"]["arm"] for one in failed)
        return UNRESOLVED, f"{runs} of its runs failed, more than of the baseline's"
    if trend is None or p is None:
        return UNRESOLVED, "a trend takes two seeds at which both finished at every size"
    if p <= ALPHA:
        return judge_slope(trend)
    return judge_persistence(verdicts[-1], trend)


def judge_slope(trend: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict of a trend that is resolved."""
    first, last = (log_of(one["value"]) for one in trend["gain_at"])
    why = "what it is worth in compute changes with size, at the 5 % level"
    if first * last < 0:
        why += "; it changes sign between the smallest size and the largest"
    return (SHRINKS if abs(last) < abs(first) else GROWS), why


def judge_persistence(at_top: str, trend: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict where no trend is resolved."""
    no_trend = "no trend with size is resolved"
    if at_top not in (BETTER, WORSE):
        return UNRESOLVED, f"{no_trend}, nor a difference at the largest size ({at_top})"
    low, high = trend["gain_next"]["ci95"] or (None, None)
    is_held = low is not None and low > 1 if at_top == BETTER else high is not None and high < 1
    if not is_held:
        why = f"{at_top} at the largest size, but too uncertain a trend to say that it goes on"
        return UNRESOLVED, why
    return PERSISTS, f"{at_top} at the largest size and, by the line through all, at the next one"


def log_of(factor: float | None) -> float:
    """Return the logarithm of a factor; infinite where it is unbounded, or 0."""
    if factor is None:
        return math.inf
    return math.log(factor) if factor > 0 else -math.inf
