"""The tables of losses and differences of an ablation's report, and how numbers are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lswt_core.reporting.tables import Table

Report = dict[str, Any]  # see compare.make_report
LOSSES = (
    *("arm", "held-out loss ± sd", "perplexity", "bits/byte", "paired difference", "95 % interval"),
    *("verdict", "seeds (failed)"),
)
TESTS = (
    *("arm", "p", "p (looks, Holm)", "p beyond the margin", "p within the margin"),
    *("seeds needed, about .. at most", "looks"),
)
UNIGRAM = "unigram model, no context"
# known of every arm: a missing number could not be computed
ALWAYS_APPLY = {"flops_per_token", "training_flops"}


def loss_table(report: Report) -> Table:
    """Return losses and paired differences of all arms, and the loss without any context."""
    compared = {one["arm"]: one for one in report["comparisons"]}
    rows = []
    for arm in report["arms"]:
        comparison = compared.get(arm["name"])
        rows.append(baseline_row(arm) if comparison is None else comparison_row(arm, comparison))
    if report["arms"][0]["unigram"]["loss"] is not None:
        rows.append(unigram_row(report["arms"][0]["unigram"]))
    return Table(LOSSES, rows, text_columns=(0, 6))


def baseline_row(arm: dict[str, Any]) -> list[str]:
    """Return the baseline's row of the loss table."""
    finished = sum(value is not None for value in arm["final_loss"]["values"])
    losses = [format_mean_loss(arm), *format_scales(arm)]
    return [arm["name"], *losses, "", "", "baseline", count_seeds(arm, finished)]


def comparison_row(arm: dict[str, Any], one: dict[str, Any]) -> list[str]:
    """Return an arm's row of the loss table."""
    differences = [
        format_or_missing(one, "delta", format_difference),
        format_or_missing(one, "ci95", format_interval),
    ]
    losses = [format_mean_loss(arm), *format_scales(arm)]
    return [arm["name"], *losses, *differences, one["verdict"], count_seeds(arm, one["seeds"])]


def unigram_row(unigram: dict[str, Any]) -> list[str]:
    """Return the row of a model that ignores its context."""
    scales = [format_number(unigram[key], spec) for key, spec in SCALES.items()]
    return [UNIGRAM, f"{unigram['loss']:.4f}", *scales, "", "", "", ""]


SCALES = {"perplexity": ",.2f", "bits_per_byte": ".4f"}


def format_scales(arm: dict[str, Any]) -> list[str]:
    """Return an arm's mean loss as perplexity and in bits per byte."""
    return [
        describe_missing(arm, key) if arm[key] is None else format_number(arm[key], spec)
        for key, spec in SCALES.items()
    ]


def format_number(value: float | None, spec: str) -> str:
    """Return a number; "-" if it is not known."""
    return "-" if value is None else f"{value:{spec}}"


def list_selected(report: Report) -> list[str]:
    """Return the mean losses of arms and baseline over the same seeds, where some were lost."""
    lines = []
    for one in report["comparisons"]:
        if not one["lost"] or one["means"]["arm"] is None:
            continue
        arm, baseline = one["means"]["arm"], one["means"]["baseline"]
        lines.append(
            f"{one['arm']}: the difference is over the {one['seeds']} seeds at which both finished,"
            f" where its mean is {arm:.4f} and the baseline's {baseline:.4f}; the table has the"
            " means over all finished runs of each."
        )
    return lines


def significance_table(report: Report) -> Table:
    """Return p values, looks, and the seeds of a new study for every arm."""
    rows = []
    for one in report["comparisons"]:
        keys = ("p", "p_holm", "p_clear_holm", "p_equivalent_holm")
        numbers = [format_or_missing(one, key, format_p) for key in keys]
        needed = format_or_missing(one, "seeds_needed", lambda seeds: f"{seeds:,}")
        if one["seeds_needed"] is not None:
            needed += f" .. {format_number(one['seeds_needed_at_most'], ',')}"
        declared, taken = (
            ", ".join(map(str, one["looks"][key])) or "none" for key in ("declared", "taken")
        )
        rows.append([one["arm"], *numbers, needed, f"declared {declared}; taken {taken}"])
    return Table(TESTS, rows, text_columns=(0, 6))


def seed_table(report: Report) -> Table:
    """Return the held-out loss of every run."""
    names = [arm["name"] for arm in report["arms"]]
    missing = {(one["arm"], seed) for one in report["unfinished"] for seed in one["seeds"]}
    rows = []
    for number, seed in enumerate(report["settings"]["seeds"]):
        cells = []
        for arm in report["arms"]:
            value = arm["final_loss"]["values"][number]
            absent = "not finished" if (arm["name"], seed) in missing else "failed"
            cells.append(absent if value is None else f"{value:.4f}")
        rows.append([str(seed), *cells])
    return Table(("seed", *names), rows)


def count_seeds(arm: dict[str, Any], seeds: int) -> str:
    """Return the seeds that a row is about, and how many of all runs of its arm failed."""
    return f"{seeds} ({len(arm['failures'])} of {len(arm['final_loss']['values'])})"


def format_mean_loss(arm: dict[str, Any]) -> str:
    """Return an arm's mean loss and its standard deviation over seeds."""
    mean, std = arm["final_loss"]["mean"], arm["final_loss"]["std"]
    shown = describe_missing(arm, "mean") if mean is None else f"{mean:.4f}"
    if std is not None:
        return f"{shown} ± {std:.4f}"
    if "std" in arm["unknown"]:
        return f"{shown} ± unknown"
    return shown


def format_interval(interval: tuple[float, float]) -> str:
    """Return an interval of differences."""
    return " .. ".join(map(format_difference, interval))


def format_difference(value: float) -> str:
    """Return a difference in nats: with four decimals, or in scientific notation if too small."""
    if value == 0 or abs(value) >= 0.00005:
        return f"{value:+.4f}"
    return f"{value:+.1e}"


def format_p(p: float) -> str:
    """Return a p value."""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def format_or_missing(entry: dict[str, Any], key: str, show: Callable[[Any], str]) -> str:
    """Return a number of the report, or what stands for one that is missing."""
    value = entry[key]
    return describe_missing(entry, key) if value is None else show(value)


def describe_missing(entry: dict[str, Any], key: str) -> str:
    """Return "unknown" for a number that could not be computed, "-" for one that does not apply."""
    if key in {*entry["unknown"], *ALWAYS_APPLY} or "delta" in entry["unknown"]:
        return "unknown"
    return "-"
