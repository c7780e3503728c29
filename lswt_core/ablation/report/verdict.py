"""The verdict about an arm and why: better, worse, one of both but maybe by less than the margin,
equivalent, not resolved or failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lswt_core.ablation.statistics.paired_runs import adjust_holm

ALPHA = 0.05
BETTER, WORSE, EQUIVALENT = "better", "worse", "equivalent"
SMALL_BETTER, SMALL_WORSE = (f"{side}, maybe by less than the margin" for side in (BETTER, WORSE))
SMALL = (SMALL_BETTER, SMALL_WORSE)
UNRESOLVED, FAILED = "not resolved", "failed"
FEWEST = 3  # pairs that support a verdict
# p value of a comparison, valid under all looks -> the same after Holm's correction
P_VALUES = {"p_looks": "p_holm", "p_equivalent": "p_equivalent_holm", "p_clear": "p_clear_holm"}


def adjust_family(comparisons: list[dict[str, Any]], others: Sequence[dict[str, Any]] = ()) -> None:
    """Add to every comparison its p values adjusted (Holm-Bonferroni) over all comparisons with the
    same baseline, those of other studies (``others``) included: of no difference ("p_holm"), of one
    beyond the margin ("p_equivalent_holm"), of one within it ("p_clear_holm"). "alpha" and
    "alpha_equivalent" are the levels at which the first two are tested in Holm's steps.
    """
    for key, adjusted in P_VALUES.items():
        p_values = [one[key] for one in (*comparisons, *others)]
        for one, p in zip(comparisons, adjust_holm(p_values), strict=False):
            one[adjusted] = p
    for key, name in (("p_looks", "alpha"), ("p_equivalent", "alpha_equivalent")):
        known = [one[key] for one in (*comparisons, *others) if one[key] is not None]
        for one in comparisons:
            own = one[key]
            one[name] = None if own is None else ALPHA / sum(p >= own for p in known)


def add_verdicts(comparisons: list[dict[str, Any]], margin: float) -> None:
    """Add to every comparison, with adjusted p values, its verdict and its reason.

    Equivalent: the difference is within the margin, by two one-sided tests (TOST). It comes first,
    since a difference below the margin was said not to matter, significant or not. Better or worse:
    the difference is significant and so is that it exceeds the margin. SMALL: it is significant,
    but that it exceeds the margin is not. Else these seeds resolve nothing.
    """
    for one in comparisons:
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
    if one["level"] == 0.0:
        return UNRESOLVED, describe_closed_look(one) + lost
    if one["seeds"] < FEWEST and one["std"]:
        # of two runs that have two modes, both pairs may be between the same ones
        return UNRESOLVED, f"a verdict needs {FEWEST} pairs: two may agree by chance{lost}"
    verdict, why = judge_pairs(one, margin)
    claim = direction(one) if verdict in SMALL else verdict
    if claim in biased_verdicts(**one["failed"]):
        seeds, failed = one["seeds"] + one["lost"], one["failed"]
        why = (
            f"{failed['arm']} of its {seeds} runs failed, {failed['baseline']} of the baseline's:"
            f" the seeds that are left, on which it is {claim}, are selected"
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


def direction(one: dict[str, Any]) -> str:
    """Return the direction of the observed difference."""
    return BETTER if one["delta"] < 0 else WORSE


def judge_pairs(one: dict[str, Any], margin: float) -> tuple[str, str]:
    """Return the verdict of the tests on finished pairs, and why."""
    is_significant = is_below_alpha(one["p_holm"])
    if is_below_alpha(one["p_equivalent_holm"]):
        why = f"the difference is smaller than the margin of {margin:g} nats"
        if is_significant and one["delta"]:
            why += ", though the difference is resolved"
        return EQUIVALENT, why
    if is_significant and is_below_alpha(one["p_clear_holm"]):
        return direction(one), "the difference is resolved at the 5 % level and exceeds the margin"
    if is_significant:
        why = (
            "the difference is resolved at the 5 % level; that it exceeds the margin of"
            f" {margin:g} nats is not{describe_correction(one, margin)}"
        )
        return SMALL_BETTER if direction(one) == BETTER else SMALL_WORSE, why
    needed = describe_seeds_needed(one, margin)
    return UNRESOLVED, f"{describe_power(one, margin)}{needed}"


def describe_correction(one: dict[str, Any], margin: float) -> str:
    """Return why an interval looks clearer than the verdict, where it does: it is about one
    comparison, and verdicts are corrected for all of them.
    """
    interval = one.get("ci95")
    if interval is None or (interval[0] <= margin and -margin <= interval[1]):
        return ""
    return ", though its interval lies beyond: verdicts are corrected for all comparisons"


def is_below_alpha(p: float | None) -> bool:
    """Whether a p value is known and significant."""
    return p is not None and p <= ALPHA


def describe_closed_look(one: dict[str, Any]) -> str:
    """Return why no verdict is given at this number of pairs."""
    declared = one["looks"]["declared"]
    if one["seeds"] < declared[0]:
        return f"the first verdict was declared at {declared[0]} pairs, and there are fewer"
    return (
        f"none of alpha is left: looks that were not declared end at {one['looks']['last']} pairs,"
        f" and this study declared {', '.join(map(str, declared))}"
    )


def describe_power(one: dict[str, Any], margin: float) -> str:
    """Return with which power these seeds resolve a difference as large as the margin."""
    power = (
        "an unknown chance" if one["power"] is None else f"a chance of {100 * one['power']:.0f} %"
    )
    return f"a difference of {margin:g} nats would have been resolved with {power}"


def describe_seeds_needed(one: dict[str, Any], margin: float) -> str:
    """Return how many seeds would resolve a difference as large as the margin."""
    if "margin_seeds" in one["unknown"]:
        return "; how many seeds would do is unknown"
    if not one["margin_seeds"]:
        return ""
    return f"; for one of 80 % a new study needs {format_seeds(one, 'margin_seeds')}"


def format_seeds(one: dict[str, Any], key: str) -> str:
    """Return a number of seeds (of ``seed_plans.PLANS``) and its limit: the noise that it is
    computed from is itself an estimate.
    """
    most = one[f"{key}_at_most"]
    bound = "no known limit" if most is None else f"{most:,} at the most"
    return f"{one[key]:,} seeds ({bound})"
