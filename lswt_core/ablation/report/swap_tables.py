"""The tables of what arms change, and of their certificates."""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.report.loss_tables import Report
from lswt_core.reporting.tables import Table

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
