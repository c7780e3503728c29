"""The results of a ladder as text: sentences and a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lswt_core.ablation.report.facts import describe_held_out
from lswt_core.ablation.report.loss_tables import Report, format_difference
from lswt_core.ablation.report.tuning_text import describe_standing
from lswt_core.ablation.report.unfinished import NOT_FINISHED
from lswt_core.ablation.report.verdict import BETTER, SMALL, UNRESOLVED, WORSE
from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_count

LADDER_PICTURE = "report-ladder.png"
HEADER = (
    *("arm", "size", "baseline's loss", "difference", "95 % interval", "verdict"),
    *("worth of compute (95 %)", "seeds"),
)
Entry = dict[str, Any]
UNKNOWN_WORTH = "it is not resolved whether it saves compute: it is worth"
TESTED_RUNGS = 3  # sizes that a law of three parameters fits exactly


def list_reports(report: Report) -> Iterator[tuple[str, Report]]:
    """Yield the report of every size with its name; without a ladder it is the only one ("")."""
    if "ladder" not in report:
        yield "", report
        return
    for rung in report["ladder"]["rungs"]:
        yield rung["name"], rung["report"]


def summarize_ladder(report: Report) -> list[str]:
    """Return a sentence about every arm, and on what all of them rest."""
    ladder = report["ladder"]
    rungs = ladder["rungs"]
    sizes = f"{rungs[0]['name']} to {rungs[-1]['name']}"
    standing = describe_standing(report)
    seeds = format_count(len(report["settings"]["seeds"]), "seed")
    lines = [summarize_arm(one, rungs[-1]["name"], standing) for one in ladder["arms"]]
    lines.append(
        f"Based on {seeds} at {format_count(len(rungs), 'size')}, {sizes}, a factor of"
        f" {compute_range(rungs)} in training compute; losses are on {describe_held_out(report)};"
        " nothing is said beyond the next size."
    )
    return lines


def describe_rates(report: Report) -> list[str]:
    """Return where the rates of arms that were not tuned come from."""
    rate, source = report["ladder"]["rate"], "the recipes' rates at every size"
    if rate is not None:
        source = (
            f"the recipes' {rate['key']} at {rate['at']}, times (N / N0)^{rate['exponent']:.2f} at"
            " other sizes"
        )
    return [f"UNTUNED: {source}, which may suit one arm, or size, better than another."]


def describe_carried(ladder: Entry) -> list[str]:
    """Return whether values that were tuned at the smallest size are good at the largest."""
    if ladder["carried"] is None:
        return []
    ends = ladder["rungs"][0]["name"], ladder["rungs"][-1]["name"]
    better = [one for one in ladder["carried"] if one["difference"] and one["difference"] < 0]
    text = f"Values were tuned at {ends[0]} and carried up (muP)"
    if not better:
        return [f"{text}; at {ends[1]} none beside them does better (one seed)."]
    parts = [
        f"{one['arm']}, {one['key']} = {one['value']:g} by {-one['difference']:.4f} nats"
        for one in better
    ]
    return [f"{text}; at {ends[1]} values beside them do better (one seed): {'; '.join(parts)}."]


def compute_range(rungs: list[Entry]) -> str:
    """Return the ratio of the largest training compute to the smallest."""
    ends = rungs[0]["training_flops"], rungs[-1]["training_flops"]
    return f"{ends[1] / ends[0]:,.0f}" if all(ends) else "unknown size"


def headline(one: Entry, size: str) -> str:
    """Return the verdict about an arm; where none is resolved over sizes, that at the largest
    comes first.
    """
    if one["verdict"] == UNRESOLVED:
        at_top = one["comparisons"][-1]["verdict"]
        if at_top in (BETTER, WORSE, *SMALL):
            return f"at {size} {at_top}; beyond it {UNRESOLVED}"
    verdict: str = one["verdict"]
    return verdict


def summarize_arm(one: Entry, size: str, standing: str) -> str:
    """Return the verdict about an arm, and what it is worth; ``standing`` says whether arms were
    tuned.
    """
    text = f"{one['arm']}: {headline(one, size)} ({standing}); {one['why']}."
    if one["verdict"] == NOT_FINISHED:
        return text
    worth = one["speedup"] and one["speedup"]["compute"]
    if not worth or worth["value"] is None or (worth["ci95"] is None and one["seeds"] > 1):
        why = one["unknown"].get("speedup", "losses do not fall with compute as a law would")
        return f"{text} What it is worth in compute is unknown: {why}."
    cost = one["speedup"]["cost"] - 1
    known = "it is worth" if is_worth_known(worth) else UNKNOWN_WORTH
    text += f" At {size}, its {cost:+.1%} of FLOPs included, {known}"
    text += f" {format_worth(worth)} of compute"
    if one["speedup"]["time"] is not None:
        text += f", {format_worth(one['speedup']['time'])} of time as measured here"
    return f"{text}{describe_range(one)}."


def describe_range(one: Entry) -> str:
    """Return what an arm is worth for other irreducible losses, where sizes are too few to test the
    law: intervals over seeds have no part in whether the law holds.
    """
    speedup, law = one["speedup"], one["law"]
    if len(one["comparisons"]) > TESTED_RUNGS or not is_worth_known(speedup["compute"]):
        return ""
    fitted = {"l_inf": law["l_inf"]["value"], "value": speedup["compute"]["value"]}
    known = [entry for entry in (*speedup["if_l_inf"], fitted) if entry["value"] is not None]
    worth, l_inf = ([entry[key] for entry in known] for key in ("value", "l_inf"))
    return (
        f"; {format_percent(min(worth))} to {format_percent(max(worth))} of compute for an"
        f" irreducible loss of {min(l_inf):.3g} to {max(l_inf):.3g} nats, which"
        f" {len(one['comparisons'])} sizes fit but cannot test"
    )


def is_worth_known(factor: Entry) -> bool:
    """Whether it is known if an arm saves or costs compute: its interval is bounded, without 1."""
    low, high = factor["ci95"] or (None, None)
    return low is not None and high is not None and not low <= 1 <= high


def format_worth(factor: Entry) -> str:
    """Return a speedup as a percentage with its interval: "+12 % (95 % interval +8 % to ...)"."""
    return f"{format_percent(factor['value'])} ({format_ends(factor, format_percent)})"


def format_ends(number: Entry, show: Any) -> str:
    """Return an interval in words."""
    if number["ci95"] is None:
        return "no interval"
    low, high = number["ci95"]
    return f"95 % interval {show(low)} to {show(high)}"


def format_percent(factor: float | None) -> str:
    """Return a factor less one, in percent; a factor without bound is infinite."""
    if factor is None:
        return "unbounded"
    percent = 100 * (factor - 1)
    return f"{percent:+,.0f} %" if abs(percent) >= 10 else f"{percent:+.1f} %"


def ladder_table(report: Report) -> Table:
    """Return every arm at every size."""
    ladder = report["ladder"]
    rows = []
    for one in ladder["arms"]:
        for number, rung in enumerate(ladder["rungs"]):
            rows.append(rung_row(one, number, rung))
    return Table(HEADER, rows, text_columns=(0, 1, 5))


def rung_row(one: Entry, number: int, rung: Entry) -> list[str]:
    """Return an arm's row at one size."""
    comparison = one["comparisons"][number]
    loss = rung["report"]["arms"][0]["final_loss"]["mean"]
    worth = one["speedup"] and one["speedup"]["by_rung"][number]
    return [
        one["arm"] if number == 0 else "",
        rung["name"],
        "" if loss is None else f"{loss:.4f}",
        "" if comparison["delta"] is None else format_difference(comparison["delta"]),
        format_span(comparison["ci95"], format_difference),
        comparison["verdict"],
        format_cell(worth) if worth and (worth["ci95"] or one["seeds"] < 2) else "",
        str(comparison["seeds"]),
    ]


def format_cell(worth: Entry) -> str:
    """Return what an arm is worth, with its interval, for a cell."""
    span = format_span(worth["ci95"], format_percent)
    return f"{format_percent(worth['value'])} ({span})" if span else format_percent(worth["value"])


def format_span(ends: Any, show: Any) -> str:
    """Return an interval for a cell; empty where there is none."""
    return "" if ends is None else f"{show(ends[0])} .. {show(ends[1])}"


def describe_ladder_picture(report: Report) -> str:
    """Return the picture's content in words, as alternative text."""
    arms, sizes = report["ladder"]["arms"], [one["name"] for one in report["ladder"]["rungs"]]
    shown = []
    for one in arms:
        deltas = [comparison["delta"] for comparison in one["comparisons"]]
        known = [
            f"{format_difference(delta)} at {size}"
            for size, delta in zip(sizes, deltas, strict=True)
            if delta is not None
        ]
        shown.append(f"{one['arm']}: {', '.join([one['verdict'], *known])}")
    return (
        "Held-out loss of every arm over training compute with fitted laws, and its difference to"
        " the baseline's (nats per token) and worth in compute at every size, with 95 % intervals."
        f" {'; '.join(shown)}."
    )
