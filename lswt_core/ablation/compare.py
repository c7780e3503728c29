"""From a study's outcomes to its report as plain data: what every arm came to, and what can be said of its difference."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from lswt_core.ablation.outcome import Arm, Outcome, Study
from lswt_core.ablation.statistics import Paired, correlation, equivalence, holm, over_documents, paired, power, seeds_needed

ALPHA = 0.05
BETTER, WORSE, EQUIVALENT, UNRESOLVED, FAILED = "better", "worse", "equivalent", "not resolved", "failed"


def report(study: Study) -> dict[str, Any]:
    """The whole report.

    "arms": name, swap, parameters, trainable, flops_per_token, final_loss {mean, std, values by seed, None where a run failed},
    tokens_per_second, peak_bytes, seconds, probes, failures, changes, by_component, components. "comparisons", each of an arm with
    the baseline: delta (arm - baseline, nats per token), ci95, p, p_holm, verdict, seeds (pairs), seeds_needed (to resolve the delta
    that was seen) and more. "certificate", "settings", "environment", "citations", "recipe", "command", "name".
    """
    baseline, *others = study.arms
    comparisons = [compare(baseline, arm, study.settings) for arm in others]
    judge(comparisons, study.settings["margin"])
    cited = [c["citation"].strip() for arm in study.arms for c in arm.components if c["citation"].strip()]
    return {
        "name": study.name,
        "command": study.command,
        "settings": study.settings,
        "arms": [arm_entry(arm) for arm in study.arms],
        "comparisons": comparisons,
        "certificate": study.certificate,
        "environment": study.environment,
        "citations": list(dict.fromkeys(cited)),
        "recipe": study.recipe,
    }


def arm_entry(arm: Arm) -> dict[str, Any]:
    """What an arm is and came to."""
    done = finished(arm)
    losses = [one.loss for one in done if one.loss is not None]
    return {
        "name": arm.name,
        "swap": arm.swap,
        "parameters": arm.parameters,
        "trainable": arm.trainable,
        "flops_per_token": arm.flops_per_token,
        "final_loss": {
            "mean": fmean(losses) if losses else None,
            "std": stdev(losses) if len(losses) > 1 else None,
            "values": [one.loss for one in arm.outcomes],
        },
        "tokens_per_second": middle([one.tokens_per_second for one in done]),
        "peak_bytes": middle([one.peak_bytes for one in done]),
        "seconds": sum(one.seconds for one in arm.outcomes),
        "probes": {name: fmean(one.probes[name] for one in done) for name in (done[0].probes if done else {})},
        "failures": [{"seed": one.seed, "why": one.failure} for one in arm.outcomes if one.failure],
        "by_component": arm.by_component,
        "changes": arm.changes,
        "components": [{key: value for key, value in one.items() if key != "citation"} for one in arm.components],
    }


def finished(arm: Arm) -> list[Outcome]:
    """The runs that came to an end."""
    return [one for one in arm.outcomes if one.failure is None]


def middle(values: Sequence[float | None]) -> float | None:
    """The median of what is known."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def pairs_of(baseline: Arm, arm: Arm) -> list[tuple[Outcome, Outcome]]:
    """The seeds at which both have finished."""
    return [(one, other) for one, other in zip(baseline.outcomes, arm.outcomes, strict=True) if one.failure is other.failure is None]


def compare(baseline: Arm, arm: Arm, settings: dict[str, Any]) -> dict[str, Any]:
    """An arm against the baseline; verdict and adjusted p are given once all arms are known."""
    pairs, margin = pairs_of(baseline, arm), settings["margin"]
    before, after = ([one.loss or 0.0 for one in side] for side in zip(*pairs, strict=True)) if pairs else ([], [])
    entry: dict[str, Any] = {"arm": arm.name, "baseline": baseline.name, "seeds": len(pairs), "lost": len(arm.outcomes) - len(pairs)}
    if not pairs:
        unknown = ("delta", "ci95", "p", "seeds_needed", "std", "correlation", "p_equivalent", "documents_ci95", "margin_seeds", "power")
        return entry | dict.fromkeys(unknown) | {"margin": margin, "values": []}
    differences = [other - one for one, other in zip(before, after, strict=True)]
    found = paired(differences, settings["confidence"])
    return entry | {
        "delta": found.delta,
        "ci95": found.ci,
        "p": found.p,
        "seeds_needed": seeds_needed(found.delta, found.std),
        "values": differences,
        "std": found.std,
        "correlation": correlation(before, after),
        "margin": margin,
        "p_equivalent": equivalence(differences, margin).p,
        "margin_seeds": seeds_needed(margin, found.std),
        "power": chance(found, margin),
        "documents_ci95": documents_interval(pairs, settings["confidence"]),
    }


def chance(found: Paired, margin: float) -> float | None:
    """With what chance these seeds would have found a difference as large as the margin."""
    if found.std is None:
        return None
    return 1.0 if found.std == 0.0 else power(margin, found.std, found.pairs)


def documents_interval(pairs: Sequence[tuple[Outcome, Outcome]], confidence: float) -> tuple[float, float] | None:
    """The interval over other held-out texts; None where there is but one document, or the arms read different ones."""
    outcomes = [one for pair in pairs for one in pair]
    listed = [[(name, tokens) for name, _, tokens in one.documents] for one in outcomes]
    if len(listed[0]) < 2 or any(other != listed[0] for other in listed):
        return None
    sums = np.array([[total for _, total, _ in one.documents] for one in outcomes])  # [2 pairs, documents]
    tokens = np.array([tokens for _, tokens in listed[0]], dtype=np.float64)
    return over_documents(sums[::2], sums[1::2], tokens, confidence)


def judge(comparisons: list[dict[str, Any]], margin: float) -> None:
    """Give every comparison its verdict, with p values adjusted over all of them (Holm).

    Equivalent: within the margin, by both one-sided tests; it comes first, since what is smaller than the margin was said not to
    matter, be it resolved or not. Better or worse: a difference that is resolved. Else nothing can be said with these seeds.
    """
    differ, agree = (holm([one[key] for one in comparisons]) for key in ("p", "p_equivalent"))
    for one, p, p_equivalent in zip(comparisons, differ, agree, strict=True):
        one["p_holm"], one["p_equivalent_holm"] = p, p_equivalent
        one["verdict"], one["why"] = verdict(one, margin)


def verdict(one: dict[str, Any], margin: float) -> tuple[str, str]:
    """What can be said of an arm, and why."""
    if one["delta"] is None:
        return FAILED, "no seed at which both the arm and the baseline finished"
    lost = f"; of the seeds at which both finished: {one['lost']} more were lost" if one["lost"] else ""
    if one["p"] is None:
        return UNRESOLVED, f"one pair of runs tells nothing of the noise between seeds{lost}"
    if one["p_equivalent_holm"] <= ALPHA:
        known = ", though the difference is resolved" if one["p_holm"] <= ALPHA and one["delta"] else ""
        return EQUIVALENT, f"the difference is smaller than the margin of {margin:g} nats{known}{lost}"
    if one["p_holm"] <= ALPHA:
        return (BETTER if one["delta"] < 0 else WORSE), f"the difference is resolved at the 5 % level{lost}"
    needed = one["seeds_needed"]
    more = f"a difference like the one seen would take about {needed} seeds to resolve" if needed else "no number of seeds is in sight"
    return UNRESOLVED, f"{more}; one of {margin:g} nats would have been seen with a chance of {one['power']:.0%}{lost}"
