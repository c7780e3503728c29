"""What an ablation found, in sentences: what spoils it, then a verdict about every arm."""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.certify_runs import NOT_COMPARED
from lswt_core.ablation.match import MAX_RESIDUAL
from lswt_core.ablation.report.cost_tables import compare_amounts
from lswt_core.ablation.report.facts import (
    compare_with_unigram,
    describe_held_out,
)
from lswt_core.ablation.report.ladder_text import list_reports, summarize_ladder
from lswt_core.ablation.report.loss_tables import Report, format_difference
from lswt_core.ablation.report.tuning_text import (
    describe_standing,
    summarize_fixed,
    summarize_horizons,
)
from lswt_core.ablation.report.unfinished import describe_unfinished
from lswt_core.reporting.units import format_count


def list_findings(report: Report) -> list[str]:
    """Return what spoils the study, the verdicts, and on how many seeds and steps they rest."""
    sentences = list_alarms(report)
    if "ladder" in report:
        return sentences + summarize_ladder(report)
    sentences += list_verdicts(report)
    sentences += [*summarize_fixed(report), *summarize_horizons(report)]
    return [*sentences, f"Based on {format_extent(report)}; lower is better."]


def list_verdicts(report: Report) -> list[str]:
    """Return a sentence about every arm."""
    standing, (baseline, *arms) = describe_standing(report), report["arms"]
    return [
        summarize_comparison(one, standing) + describe_budget(arm, baseline)
        for one, arm in zip(report["comparisons"], arms, strict=True)
    ]


def describe_budget(arm: dict[str, Any], baseline: dict[str, Any]) -> str:
    """Return how much more an arm had than the baseline; empty where the difference would count as
    matched, of both parameters and FLOPs.
    """
    kinds = {"training_flops": "training FLOPs", "parameters": "parameters"}
    parts = []
    for key, name in kinds.items():
        own, other = arm[key], baseline[key]
        if own and other and abs(own / other - 1) > MAX_RESIDUAL:
            parts.append(f"{name} {compare_amounts(own, other)}")
    return f" Its budget differs: {', '.join(parts)}." if parts else ""


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


def format_extent(report: Report) -> str:
    """Return the number of seeds, steps and tokens, the size of the model, and the text."""
    settings = report["settings"]
    return (
        f"{format_count(len(settings['seeds']), 'seed')} of {settings['steps']:,} steps"
        f" ({settings['tokens']:,} tokens) each, with {report['arms'][0]['parameters']:,}"
        f" parameters; losses are on {describe_held_out(report)}"
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
    """Return the interval of a difference on this text, and on other documents of this kind."""
    here, beyond = (spell_interval(one[key]) for key in ("ci95", "kind_of_text_ci95"))
    if not here:
        return "no interval"
    if not beyond:
        return f"95 % interval {here} on this text"
    if beyond == here:
        return f"95 % interval {here}, on other documents of this kind too"
    return f"95 % interval {here} on this text, {beyond} on other documents of this kind"


def spell_interval(interval: tuple[float, float] | None) -> str:
    """Return an interval in words; empty where there is none."""
    return "" if interval is None else " to ".join(map(format_difference, interval))


def describe_picture(report: Report) -> str:
    """Return the picture's content in words, as alternative text."""
    shown = [f"{one['arm']}: {one['verdict']}{format_bar(one)}" for one in report["comparisons"]]
    return (
        "Held-out loss of every arm less the baseline's in nats per token, with 95 % intervals,"
        f" seeds and a margin of {report['settings']['margin']:g}. {'; '.join(shown)}."
    )


def format_bar(one: dict[str, Any]) -> str:
    """Return a difference and its interval, as a picture shows them; empty if there is none."""
    if one["delta"] is None:
        return ""
    ends = spell_interval(one["ci95"])
    return f", {format_difference(one['delta'])}{f' ({ends})' if ends else ''}"
