"""The tables of an ablation's costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lswt_core.ablation.report.costs import describe_cost
from lswt_core.ablation.report.loss_tables import Report, format_or_missing
from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_bytes

COSTS = ("arm", "parameters", "training FLOP", "memory", "tokens/s")
SPREADS = (
    *("arm", "FLOP per token", "training tokens", "memory, least .. most"),
    *("tokens/s, least .. most", "seconds, least .. most", "time"),
)
SHOWS: dict[str, Callable[[Any], str]] = {
    "parameters": "{:,}".format,
    "flops_per_token": "{:,}".format,
    "training_flops": "{:.3e}".format,
    "peak_bytes": format_bytes,
    "tokens_per_second": "{:,.0f}".format,
    "seconds": "{:,.1f}".format,
}


def cost_table(report: Report) -> Table:
    """Return the costs of all arms, each with its relative difference to the baseline's; of what
    is measured with an interval, or as noise.
    """
    base, measured = report["arms"][0], measured_costs(report)
    rows = []
    for arm in report["arms"]:
        cells = []
        for key in ("parameters", "training_flops"):
            difference = compare_amounts(arm[key], base[key]) if arm is not base else ""
            cells.append(join(format_or_missing(arm, key, SHOWS[key]), difference))
        for key in ("peak_bytes", "tokens_per_second"):
            shown = format_or_missing(arm, key, SHOWS[key])
            cells.append(join(shown, describe_cost(measured.get(arm["name"], {}).get(key))))
        rows.append([arm["name"], *cells])
    return Table(COSTS, rows)


def spread_table(report: Report) -> Table:
    """Return what runs were given, and how what was measured varies between the runs of an arm."""
    measured = measured_costs(report)
    rows = []
    for arm in report["arms"]:
        flops = format_or_missing(arm, "flops_per_token", SHOWS["flops_per_token"])
        cells = [flops, f"{arm['tokens']:,}"]
        cells += [format_spread(arm, key) for key in ("peak_bytes", "tokens_per_second", "seconds")]
        time = describe_cost(measured.get(arm["name"], {}).get("seconds"))
        rows.append([arm["name"], *cells, time])
    return Table(SPREADS, rows)


def measured_costs(report: Report) -> dict[str, dict[str, dict[str, Any] | None]]:
    """Return what was measured of every arm but the baseline, by name."""
    return {one["arm"]: one["costs"] for one in report["comparisons"]}


def format_spread(arm: dict[str, Any], key: str) -> str:
    """Return the least and the most of an arm's runs."""
    spread = arm["spread"][key]
    if spread is None:
        return "-"
    low, high = map(SHOWS[key], spread)
    return low if low == high else f"{low} .. {high}"


def compare_amounts(own: float | None, other: float | None) -> str:
    """Return a relative difference; empty where an amount is unknown."""
    return f"{own / other - 1:+.1%}" if own is not None and other else ""


def join(shown: str, difference: str) -> str:
    """Return an amount and its difference in one cell."""
    return f"{shown}, {difference}" if difference else shown
