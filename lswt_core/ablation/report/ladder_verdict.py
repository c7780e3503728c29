"""The verdict about an arm over sizes: does its difference persist, shrink, grow or change sign?"""

from __future__ import annotations

import math
from typing import Any

from lswt_core.ablation.report.verdict import ALPHA, BETTER, EQUIVALENT, UNRESOLVED, WORSE
from lswt_core.ablation.statistics.paired_runs import adjust_holm

PERSISTS, SHRINKS, GROWS, TURNS = "persists", "shrinks", "grows", "changes sign"


def add_ladder_verdicts(arms: list[dict[str, Any]]) -> None:
    """Add "verdict", "why" and the trends' "p_holm" (over all arms) to every arm of a ladder's
    report, and to its back-test the verdict without the largest size.
    """
    add_holm([one["trend"] for one in arms if one["trend"] is not None])
    for one in arms:
        comparisons = one["comparisons"]
        one["verdict"], one["why"] = judge_ladder(comparisons, one["trend"])
        before, lower = one["back_test"], one.pop("lower")
        if before is not None and lower is not None:
            add_holm([lower["trend"]])
            verdict, _ = judge_ladder(comparisons[:-1], lower["trend"])
            before["verdict"], before["same_verdict"] = verdict, verdict == one["verdict"]


def add_holm(trends: list[dict[str, Any]]) -> None:
    """Add p values adjusted over arms, of trends in compute and in nats."""
    for trends_of_kind in (trends, [trend["nats"] for trend in trends]):
        adjusted = adjust_holm([trend["p"] for trend in trends_of_kind])
        for trend, p in zip(trends_of_kind, adjusted, strict=True):
            trend["p_holm"] = p


def judge_ladder(
    comparisons: list[dict[str, Any]], trend: dict[str, Any] | None
) -> tuple[str, str]:
    """Return the verdict, and why. ``comparisons`` with the baseline are ordered by size.

    Losses come nearer to L_inf as models grow, so that a constant saving of compute is a difference
    that shrinks in nats, and a constant difference is a saving that grows. An arm is between the
    two, or it shrinks or grows by both yardsticks: shrinks is tested in compute and grows in nats,
    at the 5 % level over all arms. Changes sign: better at the smallest and worse at the largest
    size, or the reverse. Equivalent: within the margin at every size. Persists: none of these,
    resolved at the largest size, and the line through the gains (ln) at all sizes has the same sign
    one rung beyond, with its whole 95 % interval.
    """
    verdicts = [one["verdict"] for one in comparisons]
    if all(verdict == EQUIVALENT for verdict in verdicts):
        return EQUIVALENT, f"within {comparisons[-1]['margin']:g} nats at every size"
    failed = [one for one in comparisons if one["failed"]["arm"] > one["failed"]["baseline"]]
    if failed:
        runs = sum(one["failed"]["arm"] for one in failed)
        return UNRESOLVED, f"{runs} of its runs failed, more than of the baseline's"
    if {verdicts[0], verdicts[-1]} == {BETTER, WORSE}:
        return TURNS, f"{verdicts[0]} at the smallest size, {verdicts[-1]} at the largest"
    if trend is None or trend["p_holm"] is None:
        return UNRESOLVED, "a trend takes two seeds at which both finished at every size"
    if trend["p_holm"] <= ALPHA and falls(*(abs(log_of(one["value"])) for one in trend["gain_at"])):
        return SHRINKS, (
            "the compute that its difference in loss is worth, its own cost aside, is less at"
            " larger sizes (5 % level)"
        )
    nats = trend["nats"]
    if nats["p_holm"] <= ALPHA and falls(*(abs(value) for value in reversed(nats["line_at"]))):
        return GROWS, "its difference in nats is larger at larger sizes (5 % level)"
    return judge_persistence(verdicts[-1], trend)


def falls(first: float, last: float) -> bool:
    """Whether a size of an effect is less in the end."""
    return last < first


def judge_persistence(at_top: str, trend: dict[str, Any]) -> tuple[str, str]:
    """Return the verdict where no trend is resolved."""
    no_trend = "it is not seen to shrink or to grow"
    if at_top not in (BETTER, WORSE):
        return UNRESOLVED, f"{no_trend}; at the largest size it is {describe_top(at_top)}"
    low, high = trend["gain_next"]["ci95"] or (None, None)
    is_held = low is not None and low > 1 if at_top == BETTER else high is not None and high < 1
    if not is_held:
        why = f"its loss is {at_top} at the largest size; whether that goes on is uncertain"
        return UNRESOLVED, why
    why = f"its loss is {at_top} at the largest size and, by the line through all, at the next one"
    return PERSISTS, why


def describe_top(verdict: str) -> str:
    """Return a verdict at the largest size that is no evidence of a difference that matters."""
    return verdict if verdict != UNRESOLVED else "not resolved either"


def log_of(factor: float | None) -> float:
    """Return the logarithm of a factor; infinite where it is unbounded, or 0."""
    if factor is None:
        return math.inf
    return math.log(factor) if factor > 0 else -math.inf
