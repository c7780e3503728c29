"""The report of a study as plain data: the results of every arm, and its paired differences to the
baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

from lswt_core.ablation.report.costs import MEASURED, compare_costs
from lswt_core.ablation.report.facts import (
    LIMITS,
    common,
    describe_loss,
    describe_unigram,
    list_code,
    list_runs,
)
from lswt_core.ablation.report.family import describe_others
from lswt_core.ablation.report.held_out_text import (
    describe_text,
    documents_interval,
    kind_of_text_interval,
)
from lswt_core.ablation.report.probes import compare_probes
from lswt_core.ablation.report.seed_plans import add_plans
from lswt_core.ablation.report.unfinished import list_unfinished, withhold_verdicts
from lswt_core.ablation.report.verdict import add_verdicts, adjust_family
from lswt_core.ablation.runs.outcome import ArmResult, Looks, Outcome, Study
from lswt_core.ablation.statistics.looks import MAXIMUM, nominal_level, valid_p
from lswt_core.ablation.statistics.paired_runs import (
    PairedTest,
    clear_p,
    correlation,
    equivalence_test,
    paired_test,
    sample_std,
)

Ask = Callable[..., Any]  # ask(name, statistic, *arguments): see compute

# Keys of a comparison. None: it does not apply, or it could not be computed and "unknown" says why.
STATISTICS = (
    "delta",
    "ci95",
    "level",
    "p",
    "p_looks",
    "p_equivalent",
    "p_clear",
    "std",
    "correlation",
    "documents_ci95",
    "kind_of_text_ci95",
)


def make_report(study: Study) -> dict[str, Any]:
    """Return the whole report.

    "arms": name, swap, parameters, trainable, flops_per_token, tokens and training_flops (of a
    run), evaluated {tokens, documents, bytes}, final_loss {mean, std, values by seed, None where a
    run failed}, that mean as perplexity and bits_per_byte, unigram {loss, perplexity,
    bits_per_byte} of the same text, tokens_per_second and peak_bytes (medians), spread of both and
    of seconds [least, most], seconds (of all runs), probes, failures, changes, by_component,
    components, runs and code (see ``facts``). "comparisons", each of an arm with the
    baseline: delta (arm - baseline, nats per token); means of both over the seeds of the pairs;
    ci95, which holds at all looks together, and its level at a single look; p (at a single look),
    p_looks (valid under all looks), p_holm; verdict, why, seeds (pairs), looks {declared, taken,
    last}, failed (runs of the arm and of the baseline), the numbers of ``seed_plans.PLANS``, costs
    (see ``costs``), probes (see ``probes.compare_probes``). Both have "unknown": what could not be
    computed, and why. "family": the comparisons over which p_holm is corrected {size, others}.
    "text": the held-out one (see
    ``held_out_text.describe_text``); documents_ci95 is over other documents for these very models,
    kind_of_text_ci95 over other seeds and documents, at all looks together, and contains ci95.
    "certificate", "certificate_limits" (what no certificate shows), "settings", "environment",
    "citations", "recipe", "values" (of the recipe: key, value, where it is written, owner),
    "command", "name". "unfinished": arm and seeds of runs that are not finished; if there are any,
    no comparison has a test, an interval or a verdict.
    """
    baseline, *others = study.arms
    comparisons = [compare_with_baseline(baseline, arm, study) for arm in others]
    earlier = describe_others(study)
    adjust_family(comparisons, earlier)
    add_plans(comparisons, compute, study.settings["confidence"])
    add_verdicts(comparisons, study.settings["margin"])
    unfinished = list_unfinished(study)
    if unfinished:
        withhold_verdicts(comparisons)
    components = [one for arm in study.arms for one in arm.components]
    citations = dict.fromkeys(one["citation"].strip() for one in components)
    return {
        "name": study.name,
        "command": study.command,
        "settings": study.settings,
        "arms": [describe_arm(arm) for arm in study.arms],
        "comparisons": comparisons,
        "family": {"size": len(comparisons) + len(earlier), "others": earlier},
        "text": describe_text(study),
        "certificate": study.certificate,
        "environment": study.environment,
        "citations": list(filter(None, citations)),
        "recipe": study.recipe,
        "values": [dict(one) for one in study.values],
        "unfinished": unfinished,
        "certificate_limits": list(LIMITS),
    }


def compute(
    unknown: dict[str, str], name: str, statistic: Callable[..., Any], *arguments: Any
) -> Any:
    """Return a statistic; None if it fails or is not finite, and then ``unknown`` says why.

    The runs are made by now: no statistic may cost their report.
    """
    try:
        value = statistic(*arguments)
    except Exception as error:
        unknown[name] = f"{type(error).__name__}: {error}"
        return None
    if not is_finite(value):
        unknown[name] = f"it came to {value}"
        return None
    return value


def is_finite(value: Any) -> bool:
    """Whether a number, or every number of a tuple, is finite; None counts as finite."""
    if isinstance(value, tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def describe_arm(arm: ArmResult) -> dict[str, Any]:
    """Return the entry of an arm in the report."""
    unknown: dict[str, str] = {}
    ask = partial(compute, unknown)
    summary, loss = summarize_runs(arm.finished_runs(), ask), final_loss(arm, unknown)
    evaluated = summary["evaluated"]
    return {
        "name": arm.name,
        "swap": arm.swap,
        "parameters": arm.parameters,
        "trainable": arm.trainable,
        "flops_per_token": arm.flops_per_token,
        "tokens": arm.tokens,
        "training_flops": arm.training_flops,
        "final_loss": loss,
        **describe_loss(loss["mean"], evaluated, ask),
        "unigram": describe_unigram(arm.finished_runs(), evaluated, ask),
        **summary,
        "seconds": sum(one.seconds for one in arm.outcomes),
        "runs": list_runs(arm, arm.outcomes),
        "code": list_code(arm),
        "failures": [{"seed": one.seed, "why": one.failure} for one in arm.failed_runs()],
        "by_component": arm.by_component,
        "changes": arm.changes,
        "components": [
            {key: value for key, value in one.items() if key != "citation"}
            for one in arm.components
        ],
        "unknown": unknown,
    }


def final_loss(arm: ArmResult, unknown: dict[str, str]) -> dict[str, Any]:
    """Return the held-out losses of an arm's runs, their mean and standard deviation over seeds."""
    losses = [one.loss for one in arm.finished_runs() if one.loss is not None]
    return {
        "mean": compute(unknown, "mean", fmean, losses) if losses else None,
        "std": compute(unknown, "std", sample_std, losses) if len(losses) > 1 else None,
        "values": [one.loss for one in arm.outcomes],
    }


def summarize_runs(runs: Sequence[Outcome], ask: Ask) -> dict[str, Any]:
    """Return throughput, memory, probes and the size of the held-out text of finished runs."""
    evaluated = {
        "tokens": common({sum(tokens for *_, tokens in one.documents) for one in runs}),
        "documents": common({len(one.documents) for one in runs}),
        "bytes": common({one.evaluated_bytes for one in runs}),
    }
    probes = {}
    for name in dict.fromkeys(name for one in runs for name in one.probes):
        values = [one.probes[name] for one in runs if name in one.probes]
        mean = ask(name, fmean, values)
        if mean is not None:
            probes[name] = mean
    known = {name: [getattr(one, name) for one in runs if getattr(one, name)] for name in MEASURED}
    medians = {
        name: ask(name, median, known[name]) if known[name] else None
        for name in ("tokens_per_second", "peak_bytes")
    }
    spread = {
        name: [min(values), max(values)] if values else None for name, values in known.items()
    }
    return {"evaluated": evaluated, **medians, "spread": spread, "probes": probes}


def compare_with_baseline(baseline: ArmResult, arm: ArmResult, study: Study) -> dict[str, Any]:
    """Return the comparison of an arm with the baseline, still without a verdict."""
    pairs, unknown = arm.finished_pairs(baseline), dict[str, str]()
    looks = study.looks.get(arm.name, only_look(len(arm.outcomes), len(pairs)))
    statistics: dict[str, Any] = {"values": []}
    if pairs:
        statistics = compute_statistics(pairs, looks, study.settings, partial(compute, unknown))
    return {
        "arm": arm.name,
        "baseline": baseline.name,
        "seeds": len(pairs),
        "lost": len(arm.outcomes) - len(pairs),
        "means": compute_means(pairs, partial(compute, unknown)),
        "failed": {"arm": len(arm.failed_runs()), "baseline": len(baseline.failed_runs())},
        "margin": study.settings["margin"],
        "looks": {**looks._asdict(), "last": max(MAXIMUM, *looks.declared)},
        "costs": compare_costs(baseline, arm, study.settings["confidence"]),
        "probes": compare_probes(pairs, study.settings["confidence"]) if pairs else {},
        **dict.fromkeys(STATISTICS),
        **statistics,
        "unknown": unknown,
    }


def compute_means(pairs: Sequence[tuple[Outcome, Outcome]], ask: Ask) -> dict[str, Any]:
    """Return the mean losses of the baseline and of the arm over the same seeds."""
    means = {}
    for number, name in enumerate(("baseline", "arm")):
        losses = [pair[number].loss or 0.0 for pair in pairs]
        means[name] = ask(f"mean of the {name}", fmean, losses) if losses else None
    return means


def only_look(seeds: int, pairs: int) -> Looks:
    """Return the look of a study that declared one, and of whose seeds some pairs are left."""
    return Looks(tuple(sorted({seeds, pairs} - {0, 1})) or (seeds,), (pairs,))


def compute_statistics(
    pairs: Sequence[tuple[Outcome, Outcome]], looks: Looks, settings: dict[str, Any], ask: Ask
) -> dict[str, Any]:
    """Return all statistics of the paired differences; only "values" if the t test fails."""
    before, after = ([one.loss or 0.0 for one in side] for side in zip(*pairs, strict=True))
    values = [other - one for one, other in zip(before, after, strict=True)]
    margin, confidence = settings["margin"], settings["confidence"]
    look = ask("delta", paired_test_at_look, values, looks, confidence)
    if look is None:
        return {"values": values}
    test, level = look

    def valid(p: float | None, sides: int = 2) -> float | None:
        return valid_p(p, looks.declared, len(pairs), sides)

    equivalence = ask("p_equivalent", equivalence_test, values, margin)
    clear = ask("p_clear", clear_p, values, margin)
    return {
        "delta": test.delta,
        "ci95": test.ci,
        "level": level,
        "p": test.p,
        "p_looks": ask("p_looks", valid, test.p),
        "p_equivalent": ask("p_equivalent", valid, equivalence and equivalence.p, 1),
        "p_clear": ask("p_clear", valid, clear),
        "std": test.std,
        "values": values,
        "correlation": ask("correlation", correlation, before, after),
        "documents_ci95": ask("documents_ci95", documents_interval, pairs, confidence),
        "kind_of_text_ci95": ask(
            "kind_of_text_ci95", kind_of_text_interval, pairs, 1 - level, test.ci
        ),
    }


def paired_test_at_look(
    values: Sequence[float], looks: Looks, confidence: float
) -> tuple[PairedTest, float]:
    """Return the paired t-test, and the level of its interval at this look alone, at which the
    intervals of all looks together have ``confidence``.
    """
    level = 0.0
    if len(values) > 1:
        level = nominal_level(1 - confidence, looks.declared, len(values))
    return paired_test(values, 1 - level), level
