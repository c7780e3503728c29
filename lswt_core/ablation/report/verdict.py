"""The verdict about an arm: better, worse, equivalent, not resolved or failed, and why."""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.statistics.paired_runs import adjust_holm

ALPHA = 0.05
BETTER, WORSE, EQUIVALENT = "better", "worse", "equivalent"
UNRESOLVED, FAILED = "not resolved", "failed"


def add_verdicts(comparisons: list[dict[str, Any]], margin: float) -> None:
    """Add to every comparison its verdict, its reason, and p values adjusted over all comparisons
    (Holm-Bonferroni).

    Equivalent: the difference is within the margin, by two one-sided tests (TOST). It comes before
    better and worse, since a difference below the margin was said not to matter, significant or
    not. Better or worse: the difference is significant. Else these seeds resolve nothing.
    """
    p_adjusted = adjust_holm([one["p"] for one in comparisons])
    equivalent_adjusted = adjust_holm([one["p_equivalent"] for one in comparisons])
    for one, p, p_equivalent in zip(comparisons, p_adjusted, equivalent_adjusted, strict=True):
        one["p_holm"], one["p_equivalent_holm"] = p, p_equivalent
        one["verdict"], one["why"] = judge(one, margin)


def judge(one: dict[str, Any], margin: float) -> tuple[str, str]:
    """Return the verdict of a comparison, and why."""
    if not one["seeds"]:
        return FAILED, "no seed at which both the arm and the baseline finished"
    lost = ""
    if one["lost"]:
        lost = (
            f"; {one['lost']} of {one['seeds'] + one['lost']} pairs are dropped because a run of"
            " theirs failed: those that are left are no random sample of seeds"
        )
    if one["delta"] is None:
        why = f"the paired test could not be computed ({one['unknown']['delta']})"
        return UNRESOLVED, why + lost
    if one["p"] is None:
        return UNRESOLVED, f"one pair of runs has no information on the noise between seeds{lost}"
    verdict, why = judge_pairs(one, margin)
    if verdict in biased_verdicts(**one["failed"]):
        seeds, failed = one["seeds"] + one["lost"], one["failed"]
        why = (
            f"{failed['arm']} of its {seeds} runs failed, {failed['baseline']} of the baseline's:"
            f" the seeds that are left, on which it is {verdict}, are selected"
        )
        return UNRESOLVED, why + lost
    return verdict, why + lost


def biased_verdicts(arm: int, baseline: int) -> tuple[str, ...]:
    """Return the verdicts that remaining seeds cannot support if one side failed more often: the
    runs that are hardest for that side are missing.
    """
    if arm == baseline:
        return ()
    return EQUIVALENT, BETTER if arm > baseline else WORSE


def judge_pairs(one: dict[str, Any], margin: float) -> tuple[str, str]:
    """Return the verdict of the tests on finished pairs, and why."""
    is_significant = one["p_holm"] <= ALPHA
    p_equivalent = one["p_equivalent_holm"]
    if p_equivalent is not None and p_equivalent <= ALPHA:
        why = f"the difference is smaller than the margin of {margin:g} nats"
        if is_significant and one["delta"]:
            why += ", though the difference is resolved"
        return EQUIVALENT, why
    if is_significant:
        verdict = BETTER if one["delta"] < 0 else WORSE
        return verdict, "the difference is resolved at the 5 % level"
    return UNRESOLVED, f"{describe_seeds_needed(one)}; {describe_power(one, margin)}"


def describe_seeds_needed(one: dict[str, Any]) -> str:
    """Return how many seeds would resolve the observed difference."""
    if "seeds_needed" in one["unknown"]:
        return "how many seeds would do is unknown"
    if not one["seeds_needed"]:
        return "no number of seeds is in sight"
    seeds = one["seeds_needed"]
    return f"a difference like the one seen would take about {seeds} seeds to resolve"


def describe_power(one: dict[str, Any], margin: float) -> str:
    """Return with which power these seeds detect a difference as large as the margin."""
    power = "an unknown chance" if one["power"] is None else f"a chance of {one['power']:.0%}"
    return f"one of {margin:g} nats would have been seen with {power}"
