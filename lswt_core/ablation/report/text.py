"""The report of an ablation as text: its sentences, the terminal's output, and report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lswt_core.ablation.certify_runs import NOT_COMPARED
from lswt_core.ablation.report.costs import list_noise
from lswt_core.ablation.report.facts import compare_with_unigram, list_warnings
from lswt_core.ablation.report.family import describe_family, describe_looks
from lswt_core.ablation.report.tables import (
    Report,
    certificate_table,
    change_table,
    cost_table,
    format_difference,
    loss_table,
    probe_table,
    seed_table,
)
from lswt_core.ablation.report.tuning_text import (
    TUNING_PICTURE,
    describe_procedure,
    describe_standing,
    describe_tuning_picture,
    list_tuning_tables,
    summarize_horizons,
    summarize_scope,
    summarize_tuning,
    tuning_table,
)
from lswt_core.ablation.report.unfinished import describe_unfinished
from lswt_core.ablation.report.verdict import UNRESOLVED
from lswt_core.reporting.units import format_duration

PICTURE = "report.png"


def summarize(report: Report) -> list[str]:
    """Return the findings, what is not resolved, and on how many seeds and steps they rest."""
    settings, comparisons = report["settings"], report["comparisons"]
    extent = format_extent(settings)
    standing = describe_standing(report)
    sentences = describe_unfinished(report)
    sentences += [summarize_comparison(one, standing) for one in comparisons]
    sentences += [*summarize_tuning(report), *summarize_horizons(report)]
    unresolved = ", ".join(one["arm"] for one in comparisons if one["verdict"] == UNRESOLVED)
    if unresolved:
        sentences.append(
            f"Not resolved with {extent}: {unresolved}. That is no evidence of equality."
        )
    else:
        sentences.append(f"Based on {extent}.")
    sentences += compare_with_unigram(report["arms"])
    broken = ", ".join(one["arm"] for one in report["certificate"] if one["status"] == "broken")
    if broken:
        sentences.append(
            f"NOT A CLEAN SWAP: {broken} (see the certificate); no difference can be attributed to"
            " these swaps."
        )
    unproven = [one["arm"] for one in report["certificate"] if one["status"] == NOT_COMPARED]
    if unproven:
        sentences.append(
            f"NOT COMPARED: {', '.join(unproven)}; no records of their runs show that the swap is"
            " clean."
        )
    sentences += report["text"]["warnings"] + describe_family(report)
    sentences += [f"{note}." for note in settings.get("notes", ())]
    return [*sentences, summarize_scope(report)]


def format_extent(settings: Mapping[str, Any]) -> str:
    """Return the number of seeds, steps and tokens."""
    seeds = len(settings["seeds"])
    return (
        f"{seeds} seed{'s' if seeds != 1 else ''} of {settings['steps']:,} steps"
        f" ({settings['tokens']:,} tokens) each"
    )


def summarize_comparison(one: dict[str, Any], standing: str) -> str:
    """Return a comparison as a sentence; ``standing`` says whether arms were tuned."""
    verdict = f"{one['arm']}: {one['verdict']} ({standing})"
    if one["delta"] is None:
        return f"{verdict}; {one['why']}."
    interval = "no interval"
    if one["ci95"] is not None:
        low, high = map(format_difference, one["ci95"])
        interval = f"95 % interval {low} to {high} on this text"
    if one["kind_of_text_ci95"] is not None:
        low, high = map(format_difference, one["kind_of_text_ci95"])
        interval += f", {low} to {high} on this kind of text"
    return (
        f"{verdict}, {format_difference(one['delta'])} nats per token ({interval}); {one['why']}."
    )


def list_unknown(report: Report) -> list[str]:
    """Return every number that could not be computed, and why."""
    entries = [(arm["name"], arm["unknown"]) for arm in report["arms"]]
    entries += [(one["arm"], one["unknown"]) for one in report["comparisons"]]
    lines = []
    for name, unknown in entries:
        lines += [f"{name}: {key} is unknown: {why}" for key, why in unknown.items()]
    return lines


def list_power(report: Report) -> list[str]:
    """Return what the seeds could have resolved, how many a new study would need, and what looks
    were taken.
    """
    compared = [one for one in report["comparisons"] if one["std"] is not None]
    return [describe_noise(one) for one in compared] + describe_looks(report)


def describe_noise(one: dict[str, Any]) -> str:
    """Return the noise between an arm's seeds, and the seeds that a new study would need."""
    shared = ""
    if one["correlation"] is not None:
        shared = f"; the arms share noise with correlation {one['correlation']:.2f}"
    noise = f"differences between seeds vary by {one['std']:.2g} nats"
    margin = f"{one['margin']:g} nats"
    plans = [
        describe_plan(one, "seeds_needed", "resolve a difference like the one seen"),
        describe_plan(one, "margin_seeds", f"resolve a difference of {margin}"),
        describe_plan(one, "equivalence_seeds", f"show that the arm differs by less than {margin}"),
    ]
    wanted = "; ".join(filter(None, plans))
    new = f" With a chance of 80 %, a new study needs {wanted}." if wanted else ""
    return f"{one['arm']}: {noise}{shared}.{new}"


def describe_plan(one: dict[str, Any], key: str, aim: str) -> str:
    """Return how many seeds a new study needs for its aim; empty where that is not asked."""
    if key in one["unknown"]:
        return f"an unknown number of seeds to {aim}"
    if one[key] is None:
        return "" if key == "seeds_needed" else f"more seeds than are in sight to {aim}"
    most = one[f"{key}_at_most"]
    bound = "no known limit" if most is None else f"{most:,} at the most"
    return f"{one[key]:,} seeds ({bound}) to {aim}"


def list_document_intervals(report: Report) -> list[str]:
    """Return the uncertainty from the choice of held-out documents."""
    lines = []
    if any(one["kind_of_text_ci95"] for one in report["comparisons"]):
        lines.append(
            "On this text: over other seeds. On this kind of text: over other seeds and other"
            " documents, at this look alone; where that is no wider, documents add no uncertainty"
            " that could be seen."
        )
    for one in report["comparisons"]:
        if one["documents_ci95"] is not None:
            low, high = map(format_difference, one["documents_ci95"])
            lines.append(
                f"{one['arm']}: over other held-out documents of this kind, for these very models,"
                f" {low} to {high} (95 % interval)."
            )
    return lines


def list_failures(report: Report) -> list[str]:
    """Return every run that failed, and why."""
    lines = []
    for arm in report["arms"]:
        lines += [f"{arm['name']}, seed {one['seed']}: {one['why']}" for one in arm["failures"]]
    return lines


def describe_picture(report: Report) -> str:
    """Return the picture's content in words, as alternative text."""
    standing = describe_standing(report)
    comparisons = [summarize_comparison(one, standing) for one in report["comparisons"]]
    return (
        "Held-out loss of every arm less the baseline's, with 95 % intervals, seeds and margin;"
        " training curves and held-out loss by position. " + " ".join(comparisons)
    )


def render_terminal(report: Report) -> str:
    """Return what the command prints at its end."""
    parts = [
        loss_table(report).text(),
        cost_table(report).text(),
        *(table.text() for table in list_tuning_tables(report).values()),
        "\n".join(summarize(report)),
        "\n".join(list_unknown(report)),
        "\n".join(list_failures(report)),
    ]
    return "\n\n".join(filter(None, parts))


def render_markdown(report: Report) -> str:
    """Return report.md."""
    probes = probe_table(report)
    seconds = sum(arm["seconds"] for arm in report["arms"])
    command = (
        f"```\n{report['command']}\n```\n\nTime spent in training: {format_duration(seconds)}."
    )
    citations = ""
    if report["citations"]:
        citations = "```bibtex\n" + "\n".join(report["citations"]) + "\n```"
    parts = [
        f"# {report['name']}",
        bullet_list(summarize(report)),
        f"![{describe_picture(report)}]({PICTURE})",
        loss_table(report).markdown(),
        *(headed(title, table.markdown()) for title, table in list_tuning_tables(report).items()),
        f"![{describe_tuning_picture(report)}]({TUNING_PICTURE})" if tuning_table(report) else "",
        bullet_list(describe_procedure(report)),
        headed("What it costs", cost_table(report).markdown()),
        bullet_list(list_noise(report["comparisons"])),
        headed("Every seed", seed_table(report).markdown()),
        headed(
            "What these seeds could resolve",
            bullet_list(list_power(report) + list_document_intervals(report)),
        ),
        headed("What could not be computed", bullet_list(list_unknown(report))),
        headed("Failures", bullet_list(list_failures(report))),
        headed("Probes", probes.markdown() if probes else ""),
        headed("What the arms change", change_table(report).markdown()),
        headed("Certificate", certificate_table(report).markdown()),
        headed("What no certificate shows", bullet_list(report["certificate_limits"])),
        headed("Warnings of the runs", bullet_list(list_warnings(report["arms"]))),
        headed("Made with", command),
        headed("Citations", citations),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def headed(title: str, body: str) -> str:
    """Return a section in Markdown; empty where ``body`` is."""
    return f"## {title}\n\n{body}" if body else ""


def bullet_list(lines: Sequence[str]) -> str:
    """Return a list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)
