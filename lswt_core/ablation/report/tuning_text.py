"""What a report says of tuning and of other lengths of training: sentences and tables."""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.report.loss_tables import (
    Report,
    format_difference,
    format_interval,
    format_mean_loss,
    format_p,
)
from lswt_core.ablation.report.verdict import ALPHA
from lswt_core.reporting.tables import Table

TUNING_PICTURE = "report-tuning.png"
TUNED = (
    *("arm", "option", "recipe's", "chosen", "bracketed", "grid", "sensitivity", "runs"),
    *("difference untuned", "difference tuned"),
)
FIXED = ("arm", "held-out loss ± sd", "difference", "95 % interval", "p (Holm)", "verdict")


def list_tuned_keys(report: Report) -> str:
    """Return the options that were tuned, in words."""
    return " and ".join(option["key"] for option in report["tuning"]["options"])


def describe_standing(report: Report) -> str:
    """Return what stands behind the name of every verdict: whether arms were tuned."""
    if report.get("tuning") is None:
        return "untuned"
    best = f"each arm at its own best {list_tuned_keys(report)}"
    if "ladder" in report and report["ladder"]["carried"] is not None:
        return f"{best} of {report['ladder']['rungs'][0]['name']}"
    return best


def describe_untuned() -> list[str]:
    """Return what verdicts at the recipe's values do not hold for."""
    return [
        "UNTUNED: every arm has the recipe's hyper-parameters, which may suit one better than"
        " another (--tune optimizer.lr=5 tunes each with the same effort)."
    ]


def describe_tuned_values(report: Report) -> list[str]:
    """Return what was tuned, and what was not."""
    sentence = (
        f"Tuned: {list_tuned_keys(report)}, with the same grid and seeds for every arm; other"
        " hyper-parameters are the recipe's. That other seeds of tuning would choose other values"
        " is not in the intervals."
    )
    if report.get("horizons") is not None:
        sentence += " Values were tuned at 1 times the steps, and are the same at all lengths."
    return [sentence]


def list_edges(report: Report) -> list[str]:
    """Return which optima were not bracketed."""
    return [
        f"OPTIMUM NOT BRACKETED: {arm['arm']}, {one['key']} = {one['value']:g} ({one['why']}); a"
        " better value may lie beyond."
        for arm in report["tuning"]["arms"]
        for one in arm["chosen"]
        if not one["bracketed"]
    ]


def summarize_fixed(report: Report) -> list[str]:
    """Return the verdicts at the recipe's values, beside those at tuned ones."""
    sentences = []
    for one in report["fixed"]["comparisons"] if report.get("fixed") else ():
        delta = "no difference known"
        if one["delta"] is not None:
            delta = f"{format_difference(one['delta'])} nats per token"
        sentences.append(
            f"At the recipe's values (untuned), {one['arm']}: {one['verdict']}, {delta}."
        )
    return sentences


def tuning_table(report: Report) -> Table | None:
    """Return every arm's chosen values, with what tuning did to its difference; None: not tuned."""
    if report.get("tuning") is None:
        return None
    fixed = {one["arm"]: one for one in report["fixed"]["comparisons"]}
    tuned = {one["arm"]: one for one in report["comparisons"]}
    rows = []
    for arm in report["tuning"]["arms"]:
        deltas = [format_delta(side.get(arm["arm"])) for side in (fixed, tuned)]
        for one in arm["chosen"]:
            rows.append([arm["arm"], *chosen_cells(one), str(arm["runs"]), *deltas])
    return Table(TUNED, rows, text_columns=(0, 1, 4))


def chosen_cells(one: dict[str, Any]) -> list[str]:
    """Return the cells of a chosen value."""
    points = [point["value"] for point in one["curve"]]
    sensitivity = one["sensitivity"]
    return [
        one["key"],
        f"{one['own']:g}",
        f"{one['value']:g}",
        "yes" if one["bracketed"] else f"no: {one['why']}",
        f"{min(points):g} .. {max(points):g}",
        "-" if sensitivity is None else f"{sensitivity:.3f}",
    ]


def format_delta(one: dict[str, Any] | None) -> str:
    """Return a comparison's difference; "-" where there is none, as for the baseline."""
    if one is None or one["delta"] is None:
        return "-"
    return format_difference(one["delta"])


def fixed_table(report: Report) -> Table | None:
    """Return losses and differences at the recipe's values; None: they are the headline."""
    fixed = report.get("fixed")
    if fixed is None:
        return None
    compared = {one["arm"]: one for one in fixed["comparisons"]}
    rows = []
    for arm in fixed["arms"]:
        one = compared.get(arm["name"])
        cells = ["", "", "", "baseline"] if one is None else difference_cells(one)
        rows.append([arm["name"], format_mean_loss(arm), *cells])
    return Table(FIXED, rows, text_columns=(0, 5))


def difference_cells(one: dict[str, Any]) -> list[str]:
    """Return a comparison's difference, interval, adjusted p and verdict."""
    interval, p = "-", "-"
    if one["ci95"] is not None:
        interval = format_interval(one["ci95"])
    if one["p_holm"] is not None:
        p = format_p(one["p_holm"])
    return [format_delta(one), interval, p, one["verdict"]]


def describe_procedure(report: Report) -> list[str]:
    """Return how values were chosen."""
    tuning = report.get("tuning")
    if tuning is None:
        return []
    documents = {name: len(names) for name, names in tuning["documents"].items()}
    return [
        tuning["procedure"],
        f"{len(tuning['runs'])} runs in all. Values were chosen on {documents['choosing']} held-out"
        f" documents; all losses of this report are those on the {documents['judging']} others.",
        "Intervals and p values hold for the chosen values: in simulations of equal arms this"
        " raises false verdicts from 5 % to about 7 % with three seeds of tuning, 8 % with one.",
        "Sensitivity: mean over the grid of min(loss, initial loss) - best loss, in nats, first"
        " seed (Wortsman et al. 2023).",
    ]


def describe_tuning_picture(report: Report) -> str:
    """Return the picture's content in words, as alternative text."""
    chosen = [
        f"{arm['arm']}: {one['key']} = {one['value']:g}"
        for arm in report["tuning"]["arms"]
        for one in arm["chosen"]
    ]
    return f"Loss against the tuned value, a line for each arm. Chosen: {'; '.join(chosen)}."


# ---------- horizons


def summarize_horizons(report: Report) -> list[str]:
    """Return where the sign of a difference changes with the length of training."""
    horizons = report.get("horizons")
    if horizons is None:
        return []
    sentences = [
        f"CROSSING: {one['arm']} is {format_difference(one['deltas'][0])} at {one['from']:g} times"
        f" the recipe's steps and {format_difference(one['deltas'][1])} at {one['to']:g} times,"
        " both resolved: the verdict depends on the length of training."
        for one in horizons["crossings"]
    ]
    crossing = {one["arm"] for one in horizons["crossings"]}
    for index, one in enumerate(horizons["at"][0]["comparisons"]):
        if one["arm"] not in crossing:
            entries = [(at["multiple"], at["comparisons"][index]) for at in horizons["at"]]
            sentences.append(f"{one['arm']}: {describe_lengths(entries)}.")
    return sentences + summarize_worth(horizons)


def describe_lengths(entries: list[tuple[float, dict[str, Any]]]) -> str:
    """Return at which lengths of training an arm's difference, which never changes its sign where
    it is resolved, is resolved.
    """
    resolved = [
        f"{multiple:g}"
        for multiple, one in entries
        if one["p_horizons"] is not None and one["p_horizons"] <= ALPHA
    ]
    if len(resolved) > 1:
        return f"its difference has the same sign at {', '.join(resolved)} times the steps"
    where = f"at {resolved[0]} times the steps alone" if resolved else "at no length of training"
    return f"its difference is resolved {where}: whether it changes with length is not known"


def summarize_worth(horizons: dict[str, Any]) -> list[str]:
    """Return what differences are worth in compute, of arms whose loss the baseline has at one of
    the lengths, or between two.
    """
    sentences = []
    for one in horizons["worth"]:
        if one["value"] is None:
            continue
        interval = "no interval"
        if one["ci95"] is not None:
            low, high = (
                side if end is None else f"{end - 1:+.0%}"
                for end, side in zip(one["ci95"], ("less", "more"), strict=True)
            )
            interval = f"95 % interval {low} to {high}"
        sentences.append(
            f"{one['arm']} is worth {one['value'] - 1:+.0%} of compute ({interval}), its own FLOPs"
            " included, by the baseline's losses at these lengths (their noise is not in the"
            " interval)."
        )
    return sentences


def horizon_table(report: Report) -> Table | None:
    """Return the differences at every length of training; None where one alone was asked."""
    horizons = report.get("horizons")
    if horizons is None:
        return None
    header = ("arm", "times the steps", "steps", "difference", "95 % interval", "p (Holm)", "seeds")
    rows = []
    for index, arm in enumerate(one["arm"] for one in horizons["at"][0]["comparisons"]):
        for one in horizons["at"]:
            entry = one["comparisons"][index]
            cells = difference_cells(entry | {"p_holm": entry["p_horizons"]})[:3]
            length = [f"{one['multiple']:g}", f"{one['steps']:,}"]
            rows.append([arm, *length, *cells, str(entry["seeds"])])
    return Table(header, rows)
