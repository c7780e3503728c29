"""From a study's outcomes to its report as plain data: what every arm came to, and what can be said
of its difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, median, stdev
from typing import Any

import numpy as np

from lswt_core.ablation.outcome import Arm, Outcome, Study
from lswt_core.ablation.statistics import (
    Paired,
    correlation,
    equivalence,
    holm,
    over_documents,
    paired,
    power,
    seeds_needed,
)

ALPHA = 0.05
BETTER, WORSE, EQUIVALENT, UNRESOLVED, FAILED = (
    "better",
    "worse",
    "equivalent",
    "not resolved",
    "failed",
)
# Of a comparison. None: it does not apply, or it could not be computed and "unknown" says why.
STATISTICS = (
    "delta",
    "ci95",
    "p",
    "std",
    "correlation",
    "p_equivalent",
    "seeds_needed",
    "margin_seeds",
    "power",
    "documents_ci95",
)


def report(study: Study) -> dict[str, Any]:
    """The whole report.

    "arms": name, swap, parameters, trainable, flops_per_token, tokens and training_flops (of a
    run), evaluated {tokens, documents}, final_loss {mean, std, values by seed, None where a run
    failed}, tokens_per_second, peak_bytes, seconds, probes, failures, changes, by_component,
    components. "comparisons", each of an arm with the baseline: delta (arm - baseline, nats per
    token), ci95, p, p_holm, verdict, seeds (pairs), failed (runs of the arm and of the baseline),
    seeds_needed (to resolve the delta that was seen) and more. Both have "unknown": what could not
    be computed, and why. "certificate", "settings", "environment", "citations", "recipe",
    "command", "name".
    """
    baseline, *others = study.arms
    comparisons = [compare(baseline, arm, study.settings) for arm in others]
    judge(comparisons, study.settings["margin"])
    cited = [
        c["citation"].strip() for arm in study.arms for c in arm.components if c["citation"].strip()
    ]
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


def known(unknown: dict[str, str], name: str, statistic: Callable[..., Any], *given: Any) -> Any:
    """What a statistic gives; None if it fails or is not finite, and then ``unknown`` says why.

    The runs are made by now: no statistic may cost their report.
    """
    try:
        found = statistic(*given)
    except Exception as error:
        unknown[name] = f"{type(error).__name__}: {error}"
        return None
    if not is_finite(found):
        unknown[name] = f"it came to {found}"
        return None
    return found


def is_finite(found: Any) -> bool:
    """Whether a number, or every number of a tuple, is finite; None is no number."""
    if isinstance(found, tuple):
        return all(map(is_finite, found))
    return not isinstance(found, float) or math.isfinite(found)


def arm_entry(arm: Arm) -> dict[str, Any]:
    """What an arm is and came to."""
    unknown: dict[str, str] = {}
    return {
        "name": arm.name,
        "swap": arm.swap,
        "parameters": arm.parameters,
        "trainable": arm.trainable,
        "flops_per_token": arm.flops_per_token,
        "tokens": arm.tokens,
        "training_flops": arm.training_flops,
        "final_loss": final_loss(arm, unknown),
        **measured(finished(arm), partial(known, unknown)),
        "seconds": sum(one.seconds for one in arm.outcomes),
        "failures": [{"seed": one.seed, "why": one.failure} for one in arm.outcomes if one.failure],
        "by_component": arm.by_component,
        "changes": arm.changes,
        "components": [
            {key: value for key, value in one.items() if key != "citation"}
            for one in arm.components
        ],
        "unknown": unknown,
    }


def final_loss(arm: Arm, unknown: dict[str, str]) -> dict[str, Any]:
    """The losses of an arm's runs, their mean and their spread over seeds."""
    losses = [one.loss for one in finished(arm) if one.loss is not None]
    return {
        "mean": known(unknown, "mean", fmean, losses) if losses else None,
        "std": known(unknown, "std", stdev, losses) if len(losses) > 1 else None,
        "values": [one.loss for one in arm.outcomes],
    }


def measured(done: Sequence[Outcome], ask: Callable[..., Any]) -> dict[str, Any]:
    """What the runs that came to an end cost, and how their models look."""
    names = dict.fromkeys(name for one in done for name in one.probes)
    seen = {name: [one.probes[name] for one in done if name in one.probes] for name in names}
    texts = {(sum(tokens for *_, tokens in one.documents), len(one.documents)) for one in done}
    evaluated = texts.pop() if len(texts) == 1 else (None, None)
    means = {name: ask(name, fmean, values) for name, values in seen.items()}
    return {
        "evaluated": {"tokens": evaluated[0], "documents": evaluated[1]},
        "tokens_per_second": ask(
            "tokens_per_second", middle, [one.tokens_per_second for one in done]
        ),
        "peak_bytes": ask("peak_bytes", middle, [one.peak_bytes for one in done]),
        "probes": {name: mean for name, mean in means.items() if mean is not None},
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
    return [
        (one, other)
        for one, other in zip(baseline.outcomes, arm.outcomes, strict=True)
        if one.failure is other.failure is None
    ]


def compare(baseline: Arm, arm: Arm, settings: dict[str, Any]) -> dict[str, Any]:
    """An arm against the baseline; verdict and adjusted p are given once all arms are known."""
    pairs, unknown = pairs_of(baseline, arm), dict[str, str]()
    found = differences(pairs, settings, partial(known, unknown)) if pairs else {"values": []}
    return {
        "arm": arm.name,
        "baseline": baseline.name,
        "seeds": len(pairs),
        "lost": len(arm.outcomes) - len(pairs),
        "failed": {"arm": failures(arm), "baseline": failures(baseline)},
        "margin": settings["margin"],
        **dict.fromkeys(STATISTICS),
        **found,
        "unknown": unknown,
    }


def failures(arm: Arm) -> int:
    """How many of an arm's runs failed."""
    return len(arm.outcomes) - len(finished(arm))


def differences(
    pairs: Sequence[tuple[Outcome, Outcome]], settings: dict[str, Any], ask: Callable[..., Any]
) -> dict[str, Any]:
    """What the pairs say of the difference; without the t test itself nothing else is asked."""
    before, after = ([one.loss or 0.0 for one in side] for side in zip(*pairs, strict=True))
    values = [other - one for one, other in zip(before, after, strict=True)]
    margin, confidence = settings["margin"], settings["confidence"]
    found = ask("delta", paired, values, confidence)
    if found is None:
        return {"values": values}
    equal = ask("p_equivalent", equivalence, values, margin)
    return {
        "delta": found.delta,
        "ci95": found.ci,
        "p": found.p,
        "std": found.std,
        "values": values,
        "correlation": ask("correlation", correlation, before, after),
        "p_equivalent": equal and equal.p,
        "seeds_needed": ask("seeds_needed", seeds_needed, found.delta, found.std),
        "margin_seeds": ask("margin_seeds", seeds_needed, margin, found.std),
        "power": ask("power", chance, found, margin),
        "documents_ci95": ask("documents_ci95", documents_interval, pairs, confidence),
    }


def chance(found: Paired, margin: float) -> float | None:
    """With what chance these seeds would have found a difference as large as the margin."""
    if found.std is None:
        return None
    return 1.0 if found.std == 0.0 else power(margin, found.std, found.pairs)


def documents_interval(
    pairs: Sequence[tuple[Outcome, Outcome]], confidence: float
) -> tuple[float, float] | None:
    """The interval over other held-out texts; None where there is but one document, or the arms
    read different ones.
    """
    outcomes = [one for pair in pairs for one in pair]
    listed = [[(name, tokens) for name, _, tokens in one.documents] for one in outcomes]
    if len(listed[0]) < 2 or any(other != listed[0] for other in listed):
        return None
    # [2 pairs, documents]
    sums = np.array([[total for _, total, _ in one.documents] for one in outcomes])
    tokens = np.array([tokens for _, tokens in listed[0]], dtype=np.float64)
    return over_documents(sums[::2], sums[1::2], tokens, confidence)


def judge(comparisons: list[dict[str, Any]], margin: float) -> None:
    """Give every comparison its verdict, with p values adjusted over all of them (Holm).

    Equivalent: within the margin, by both one-sided tests; it comes first, since what is smaller
    than the margin was said not to matter, be it resolved or not. Better or worse: a difference
    that is resolved. Else nothing can be said with these seeds.
    """
    differ, agree = (holm([one[key] for one in comparisons]) for key in ("p", "p_equivalent"))
    for one, p, p_equivalent in zip(comparisons, differ, agree, strict=True):
        one["p_holm"], one["p_equivalent_holm"] = p, p_equivalent
        one["verdict"], one["why"] = verdict(one, margin)


def verdict(one: dict[str, Any], margin: float) -> tuple[str, str]:
    """What can be said of an arm, and why."""
    if not one["seeds"]:
        return FAILED, "no seed at which both the arm and the baseline finished"
    lost = (
        f"; of the seeds at which both finished: {one['lost']} more were lost"
        if one["lost"]
        else ""
    )
    if one["delta"] is None:
        return (
            UNRESOLVED,
            f"the paired test could not be computed ({one['unknown']['delta']}){lost}",
        )
    if one["p"] is None:
        return UNRESOLVED, f"one pair of runs tells nothing of the noise between seeds{lost}"
    claim, why = claimed(one, margin)
    if claim in flattered(**one["failed"]):
        seeds, failed = one["seeds"] + one["lost"], one["failed"]
        counts = (
            f"{failed['arm']} of its {seeds} runs failed, {failed['baseline']} of the baseline's"
        )
        return (
            UNRESOLVED,
            f"{counts}: the seeds that are left, on which it is {claim}, are selected{lost}",
        )
    return claim, f"{why}{lost}"


def flattered(arm: int, baseline: int) -> tuple[str, ...]:
    """What the seeds that are left cannot show if one side failed more often: its hardest runs are
    missing.
    """
    if arm == baseline:
        return ()
    return (EQUIVALENT, BETTER if arm > baseline else WORSE)


def claimed(one: dict[str, Any], margin: float) -> tuple[str, str]:
    """What the pairs that are left say, and why."""
    if one["p_equivalent_holm"] is not None and one["p_equivalent_holm"] <= ALPHA:
        seen = (
            ", though the difference is resolved" if one["p_holm"] <= ALPHA and one["delta"] else ""
        )
        return EQUIVALENT, f"the difference is smaller than the margin of {margin:g} nats{seen}"
    if one["p_holm"] <= ALPHA:
        return (
            BETTER if one["delta"] < 0 else WORSE
        ), "the difference is resolved at the 5 % level"
    return UNRESOLVED, f"{more_seeds(one)}; {resolution(one, margin)}"


def more_seeds(one: dict[str, Any]) -> str:
    """How many seeds would resolve the difference that was seen."""
    if "seeds_needed" in one["unknown"]:
        return "how many seeds would do is unknown"
    needed = one["seeds_needed"]
    return (
        f"a difference like the one seen would take about {needed} seeds to resolve"
        if needed
        else "no number of seeds is in sight"
    )


def resolution(one: dict[str, Any], margin: float) -> str:
    """What these seeds could have resolved."""
    share = "an unknown chance" if one["power"] is None else f"a chance of {one['power']:.0%}"
    return f"one of {margin:g} nats would have been seen with {share}"
