"""Probes of trained models (isotropy, attention to sinks, what --probe asks for) in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lswt_core.ablation.report.loss_tables import Report, describe_missing
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.statistics.paired_runs import paired_test
from lswt_core.reporting.tables import Table

HEADER = ("probe", "arm", "mean", "difference", "95 % interval")
NOTE = (
    "Intervals are over seeds, at 95 % for each probe alone: among many probes some differ by"
    " chance."
)


def compare_probes(
    pairs: Sequence[tuple[Outcome, Outcome]], confidence: float
) -> dict[str, dict[str, Any]]:
    """Return, of every probe that all runs of both arms have, {delta, ci95, values} of the paired
    differences; ci95 is None with one pair.
    """
    compared = {}
    for name in shared_probes(pairs):
        values = [other.probes[name] - one.probes[name] for one, other in pairs]
        test = paired_test(values, confidence)
        compared[name] = {"delta": test.delta, "ci95": test.ci, "values": values}
    return compared


def shared_probes(pairs: Sequence[tuple[Outcome, Outcome]]) -> list[str]:
    """Return the probes that all runs have, in the order of the first run."""
    runs = [run for pair in pairs for run in pair]
    return [name for name in runs[0].probes if all(name in run.probes for run in runs)]


def probe_table(report: Report) -> Table | None:
    """Return every probe of every arm, and its difference from the baseline's; None if there are
    none.
    """
    names = list(dict.fromkeys(name for arm in report["arms"] for name in arm["probes"]))
    # None: runs of the study are not finished
    compared = {one["arm"]: one["probes"] or {} for one in report["comparisons"]}
    rows = []
    for name in names:
        for arm in report["arms"]:
            difference = describe_difference(compared.get(arm["name"], {}).get(name))
            rows.append([name.replace("_", " "), arm["name"], format_probe(arm, name), *difference])
    return Table(HEADER, rows, text_columns=(0, 1)) if rows else None


def describe_difference(compared: dict[str, Any] | None) -> list[str]:
    """Return the difference of a probe and its interval, empty where there is none."""
    if compared is None:
        return ["", ""]
    interval = compared["ci95"]
    shown = "" if interval is None else f"{interval[0]:+.4f} .. {interval[1]:+.4f}"
    return [f"{compared['delta']:+.4f}", shown]


def format_probe(arm: dict[str, Any], name: str) -> str:
    """Return the mean of a probe of an arm."""
    if name in arm["probes"]:
        return f"{arm['probes'][name]:.4f}"
    return describe_missing(arm, name)
