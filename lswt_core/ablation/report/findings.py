"""What an ablation found, in sentences: what spoils it, then a verdict about every arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lswt_core.ablation.certify_runs import NOT_COMPARED
from lswt_core.ablation.report.cost_tables import compare_amounts
from lswt_core.ablation.report.facts import compare_with_unigram
from lswt_core.ablation.report.ladder_text import list_reports, summarize_ladder
from lswt_core.ablation.report.loss_tables import Report, format_difference
from lswt_core.ablation.report.tuning_text import (
    describe_standing,
    summarize_fixed,
    summarize_horizons,
)
from lswt_core.ablation.report.unfinished import describe_unfinished


def list_findings(report: Report) -> list[str]:
    """Return what spoils the study, the verdicts, and on how many seeds and steps they rest."""
    sentences = list_alarms(report)
    if "ladder" in report:
        return sentences + summarize_ladder(report)
    sentences += list_verdicts(report)
    sentences += [*summarize_fixed(report), *summarize_horizons(report)]
    extent = format_extent(report["settings"])
    return [*sentences, f"Based on {extent}; loss is on held-out text, lower is better."]


def list_verdicts(report: Report) -> list[str]:
    """Return a sentence about every arm."""
    standing, (baseline, *arms) = describe_standing(report), report["arms"]
    return [
        summarize_comparison(one, standing) + describe_budget(arm, baseline)
        for one, arm in zip(report["comparisons"], arms, strict=True)
    ]


def describe_budget(arm: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Return how much more an arm had than the baseline; empty where both had the same."""
    kinds = {"training_flops": "training FLOPs", "parameters": "parameters"}
    shown = {name: compare_amounts(arm[key], baseline[key]) for key, name in kinds.items()}
    parts = [f"{name} {share}" for name, share in shown.items() if share.strip("+-0.%")]
    return f" Its budget is another: {', '.join(parts)}." if parts else ""


def list_alarms(report: Report) -> list[str]:
    """Return why verdicts are void or say little, at any size; none if nothing is wrong."""
    sizes: dict[str, list[str]] = {}  # by sentence
    for size, one in list_reports(report):
        found = describe_unfinished(one) + compare_with_unigram(one["arms"]) + list_unclean(one)
        for sentence in found:
            sizes.setdefault(sentence, []).append(size)
    if "ladder" not in report:
        return list(sizes)
    return [f"At {', '.join(which)}: {sentence}" for sentence, which in sizes.items()]


def list_unclean(report: Report) -> list[str]:
    """Return which arms differ from the baseline in more than their swap, or may do so."""
    sentences = []
    broken = ", ".join(one["arm"] for one in report["certificate"] if one["status"] == "broken")
    if broken:
        sentences.append(
            f"NOT A CLEAN SWAP: {broken} (see the certificate); no difference can be attributed to"
            " these swaps."
        )
    tuned = [option["key"] for option in (report.get("tuning") or {"options": ()})["options"]]
    for one in report["certificate"]:
        flaws = [flaw["text"] for flaw in one["flaws"] if flaw["about"] not in tuned]
        if one["status"] == "allowed" and flaws:
            sentences.append(
                f"ALLOWED: {one['arm']} differs in more than its swap: {'; '.join(flaws)}."
            )
    unproven = [one["arm"] for one in report["certificate"] if one["status"] == NOT_COMPARED]
    if unproven:
        sentences.append(
            f"NOT COMPARED: {', '.join(unproven)}; no records of their runs show that the swap is"
            " clean."
        )
    return sentences


def format_extent(settings: Mapping[str, Any]) -> str:
    """Return the number of seeds, steps and tokens."""
    seeds = len(settings["seeds"])
    return (
        f"{seeds} seed{'s' if seeds != 1 else ''} of {settings['steps']:,} steps"
        f" ({settings['tokens']:,} tokens) each"
    )


def summarize_comparison(one: dict[str, Any], standing: str) -> str:
    """Return a comparison in words; ``standing`` says whether arms were tuned."""
    verdict = f"{one['arm']}: {one['verdict']} ({standing})"
    if one["delta"] is None:
        return f"{verdict}: {one['why']}."
    side = "above" if one["delta"] > 0 else "below"
    size = f"{format_difference(abs(one['delta'])).lstrip('+')} nats per token {side}"
    if one["delta"] == 0:
        size = "equal to"
    return (
        f"{verdict}. Its held-out loss is {size} the baseline's ({describe_intervals(one)}):"
        f" {one['why']}."
    )


def describe_intervals(one: dict[str, Any]) -> str:
    """Return the intervals of a difference, on this text and on this kind of text."""
    if one["ci95"] is None:
        return "no interval"
    low, high = map(format_difference, one["ci95"])
    interval = f"95 % interval {low} to {high} on this text"
    if one["kind_of_text_ci95"] is not None:
        low, high = map(format_difference, one["kind_of_text_ci95"])
        interval += f", {low} to {high} on this kind of text"
    return interval


def describe_picture(report: Report) -> str:
    """Return the picture's content in words, as alternative text."""
    return (
        "Held-out loss of every arm less the baseline's, with 95 % intervals, seeds and margin. "
        + " ".join(list_verdicts(report))
    )
