"""The tables of an ablation's report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lswt_core.ablation.report.costs import describe_cost
from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_bytes

Report = dict[str, Any]  # see compare.make_report
LOSSES = (
    "arm",
    "held-out loss ± sd",
    "difference",
    "95 % interval",
    "p",
    "p (looks, Holm)",
    "verdict",
    "seeds",
    "failed",
    "n needed",
)
COSTS = (
    *("arm", "parameters", "", "FLOP per token", "", "training tokens", "", "training FLOP", ""),
    *("evaluated tokens", "", "memory", "", "tokens/s", ""),
)
CERTIFICATE = (
    "arm",
    "certificate",
    "differs in",
    "shared parameters that start equal",
    "equal batches",
    "matched by",
    "other differences",
)
CHANGES = ("arm", "key", "baseline", "arm's", "written in")
# known of every arm: a missing number could not be computed
ALWAYS_APPLY = {"flops_per_token", "training_flops"}


def loss_table(report: Report) -> Table:
    """Return losses and paired differences of all arms."""
    compared = {one["arm"]: one for one in report["comparisons"]}
    rows = []
    for arm in report["arms"]:
        comparison = compared.get(arm["name"])
        rows.append(baseline_row(arm) if comparison is None else comparison_row(arm, comparison))
    return Table(LOSSES, rows, text_columns=(0, 6))


def baseline_row(arm: dict[str, Any]) -> list[str]:
    """Return the baseline's row of the loss table."""
    finished = sum(value is not None for value in arm["final_loss"]["values"])
    empty = [""] * 4
    seeds = [str(finished), count_failed(arm), ""]
    return [arm["name"], format_mean_loss(arm), *empty, "baseline", *seeds]


def comparison_row(arm: dict[str, Any], one: dict[str, Any]) -> list[str]:
    """Return an arm's row of the loss table."""
    shows: dict[str, Callable[[Any], str]] = {
        "delta": format_difference,
        "ci95": lambda ci: f"{format_difference(ci[0])} .. {format_difference(ci[1])}",
        "p": format_p,
        "p_holm": format_p,
    }
    numbers = [format_or_missing(one, key, show) for key, show in shows.items()]
    needed = format_or_missing(one, "seeds_needed", lambda seeds: f"{seeds:,}")
    seeds = [str(one["seeds"]), count_failed(arm), needed]
    return [arm["name"], format_mean_loss(arm), *numbers, one["verdict"], *seeds]


def count_failed(arm: dict[str, Any]) -> str:
    """Return how many of an arm's runs failed, in words."""
    return f"{len(arm['failures'])} of {len(arm['final_loss']['values'])}"


def format_mean_loss(arm: dict[str, Any]) -> str:
    """Return an arm's mean loss and its standard deviation over seeds."""
    mean, std = arm["final_loss"]["mean"], arm["final_loss"]["std"]
    shown = describe_missing(arm, "mean") if mean is None else f"{mean:.4f}"
    if std is not None:
        return f"{shown} ± {std:.4f}"
    if "std" in arm["unknown"]:
        return f"{shown} ± unknown"
    return shown


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


def cost_table(report: Report) -> Table:
    """Return the costs of all arms, each with its relative difference to the baseline's."""
    base = report["arms"][0]
    measured = {one["arm"]: one["costs"] for one in report["comparisons"]}
    rows = [
        [arm["name"], *cost_cells(arm, base, measured.get(arm["name"], {}))]
        for arm in report["arms"]
    ]
    return Table(COSTS, rows)


def cost_cells(
    arm: dict[str, Any], base: dict[str, Any], measured: dict[str, dict[str, Any] | None]
) -> list[str]:
    """Return an arm's costs, each with its relative difference to the baseline's; of what is
    ``measured`` with an interval, or as noise.
    """
    shows: dict[str, Callable[[Any], str]] = {
        "parameters": "{:,}".format,
        "flops_per_token": "{:,}".format,
        "tokens": "{:,}".format,
        "training_flops": "{:.3e}".format,
        "evaluated_tokens": "{:,}".format,
        "peak_bytes": format_bytes,
        "tokens_per_second": "{:,.0f}".format,
    }
    own, other = ({**one, "evaluated_tokens": one["evaluated"]["tokens"]} for one in (arm, base))
    cells = []
    for key, show in shows.items():
        difference = ""
        if arm is not base and own[key] is not None and other[key]:
            difference = f"{own[key] / other[key] - 1:+.1%}"
        if key in measured:
            difference = describe_cost(measured[key])
        cells += [format_or_missing(own, key, show), difference]
    return cells


def seed_table(report: Report) -> Table:
    """Return the held-out loss of every run."""
    seeds = report["settings"]["seeds"]
    header = ["arm", *(f"seed {seed}" for seed in seeds)]
    missing = {(one["arm"], seed) for one in report["unfinished"] for seed in one["seeds"]}
    rows = []
    for arm in report["arms"]:
        cells = []
        for seed, value in zip(seeds, arm["final_loss"]["values"], strict=True):
            absent = "not finished" if (arm["name"], seed) in missing else "failed"
            cells.append(absent if value is None else f"{value:.4f}")
        rows.append([arm["name"], *cells])
    return Table(header, rows)


def probe_table(report: Report) -> Table | None:
    """Return isotropy, attention shares and other probes; None if there are none."""
    names = list(dict.fromkeys(name for arm in report["arms"] for name in arm["probes"]))
    if not names:
        return None
    rows = [[arm["name"], *(format_probe(arm, name) for name in names)] for arm in report["arms"]]
    return Table(["arm", *(name.replace("_", " ") for name in names)], rows)


def format_probe(arm: dict[str, Any], name: str) -> str:
    """Return a probe of an arm."""
    if name in arm["probes"]:
        return f"{arm['probes'][name]:.4f}"
    return describe_missing(arm, name)


def change_table(report: Report) -> Table:
    """Return every recipe value that an arm changes, and where it is written."""
    rows = []
    for arm in report["arms"]:
        for change in arm["changes"]:
            values = [format_value(change[key]) for key in ("before", "after")]
            rows.append([arm["name"], change["key"], *values, change["where"]])
    return Table(CHANGES, rows, text_columns=range(len(CHANGES)))


def format_value(value: Any) -> str:
    """Return a recipe's value; "-" if there is none."""
    return "-" if value is None else str(value)


def certificate_table(report: Report) -> Table:
    """Return the certificates of all arms."""
    rows = [certificate_row(one) for one in report["certificate"]]
    return Table(CERTIFICATE, rows, text_columns=(0, 1, 2, 5, 6))


def certificate_row(one: dict[str, Any]) -> list[str]:
    """Return an arm's certificate; counts that are equal for all seeds are shown once."""
    shared = {f"{run['bitwise_equal']} of {run['shared_parameters']}" for run in one["runs"]}
    batches = {f"{run['batches_equal']:,} of {run['batches']:,}" for run in one["runs"]}
    knob, matched = one["matched"], ""
    if knob is not None:
        matched = f"{knob['key']} = {knob['size']} ({knob['residual']:+.3%})"
    return [
        one["arm"],
        one["status"],
        ", ".join(one["axes"]),
        ", ".join(sorted(shared)),
        ", ".join(sorted(batches)),
        matched,
        "; ".join(flaw["text"] for flaw in one["flaws"]),
    ]
