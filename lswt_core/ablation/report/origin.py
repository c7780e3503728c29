"""Where the numbers of an ablation come from: text, runs, code, settings and recipe. Every one is
traceable to its runs in the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lswt_core.ablation.report.facts import list_arm_runs, list_warnings
from lswt_core.ablation.report.held_out_text import list_document_intervals
from lswt_core.ablation.report.ladder_text import list_reports
from lswt_core.ablation.report.loss_tables import Report
from lswt_core.ablation.report.swap_tables import format_value
from lswt_core.reporting.sections import Bullets, Code, Part, Section
from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_duration

RUNS = ("for", "arm", "seed", "held-out loss", "key")
CODE = ("arm", "component", "distribution", "version", "sha256 of the source")
DEFAULTS = ("key", "value", "default of")
WRITTEN = ("key", "value", "written in")
DOCUMENTS = ("document", "tokens", "share")


def list_origins(report: Report) -> list[Section]:
    """Return the sections about where numbers come from."""
    described = {**report["settings"], **report["environment"]}
    citations = "\n".join(report["citations"])
    return [
        Section("Text", text_parts(report), folded=True),
        Section("Runs", run_parts(report), folded=True),
        Section("Code", [code_table(report), Bullets(list_cores(report))], folded=True),
        Section("Settings and environment", [settings_table(described)], folded=True),
        Section("The baseline's recipe", recipe_parts(report), folded=True),
        Section("Command", command_parts(report), folded=True),
        Section("Citations", [Code(citations, "bibtex")], folded=True),
    ]


# ---------- text


def text_parts(report: Report) -> list[Part]:
    """Return what the held-out text is, and how far differences hold beyond it."""
    documents = report["text"]["most"]
    rows = [[one["name"], f"{one['tokens']:,}", f"{one['share']:.1%}"] for one in documents]
    return [text_table(report), Table(DOCUMENTS, rows), Bullets(list_document_intervals(report))]


def text_table(report: Report) -> Table:
    """Return size, concentration and fingerprints of the held-out text."""
    text, baseline = report["text"], report["arms"][0]
    facts = {
        "documents": text["documents"],
        "documents of equal size that would be as concentrated": text["effective"],
        "documents that hold half of the tokens": text["half"],
        "tokens": text["tokens"],
        "bytes": baseline["evaluated"]["bytes"],
        "fingerprint of the data source": text["fingerprint"],
        "sha256 of the evaluated tokens": text["sha256"],
    }
    known = {name: value for name, value in facts.items() if value is not None}
    rows = [[name, format_fact(value)] for name, value in known.items()]
    return Table(("held-out text", ""), rows, text_columns=(0, 1))


# ---------- runs


def run_parts(report: Report) -> list[Part]:
    """Return where every run is kept, and what runs warned of."""
    rows = []
    for purpose, runs in list_all_runs(report):
        for run in runs:
            loss = run["failure"] if run["loss"] is None else f"{run['loss']:.4f}"
            rows.append([purpose, run["arm"], str(run["seed"]), loss or "-", run["key"]])
    lines = [f"Runs are kept in {store}/KEY." for store in find_stores(report)]
    warnings = list_warnings(report["arms"])
    return [Bullets(lines + warnings), Table(RUNS, rows, text_columns=(0, 1, 4))]


def list_all_runs(report: Report) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield all runs that a report rests on, by what they were made for."""
    for size, one in list_reports(report):
        place = f" at {size}" if size else ""
        yield f"verdict{place}", list_arm_runs(one["arms"])
        if one.get("fixed") is not None:
            yield f"recipe's values{place}", list_arm_runs(one["fixed"]["arms"])
        if one.get("tuning") is not None:
            yield f"tuning{place}", one["tuning"]["runs"]
        for length in (one.get("horizons") or {"at": ()})["at"]:
            if length["multiple"] != 1.0:
                yield f"{length['multiple']:g} times the steps{place}", length["runs"]


def find_stores(report: Report) -> list[str]:
    """Return the directories in which runs are kept."""
    directories = [run["directory"] for arm in report["arms"] for run in arm["runs"]]
    return sorted({str(Path(one).parent) for one in directories if one})


# ---------- code


def code_table(report: Report) -> Table:
    """Return the source of every component: that of the baseline, and what other arms add."""
    rows, seen = [], set()
    for arm in report["arms"]:
        components = arm["code"]["components"]
        for one in components if isinstance(components, list) else [components]:
            for name, code in one.items():
                cells = [name, *(code.get(key, "-") for key in ("distribution", "version"))]
                cells.append(code.get("sha256", "-"))
                if tuple(cells) not in seen:
                    seen.add(tuple(cells))
                    rows.append([arm["name"], *cells])
    return Table(CODE, rows, text_columns=range(len(CODE)))


def list_cores(report: Report) -> list[str]:
    """Return version, commit and source of the core that runs were made with."""
    lines = []
    for arm in report["arms"]:
        core = arm["code"]["core"]
        for one in core if isinstance(core, list) else [core]:
            shown = ", ".join(f"{key} {value}" for key, value in one.items() if value)
            if shown:
                lines.append(f"Core: {shown}.")
    return list(dict.fromkeys(lines))


# ---------- settings, recipe, command


def settings_table(described: Mapping[str, Any]) -> Table:
    """Return nested settings as rows."""
    rows = [[key, format_fact(value)] for key, value in flatten(described)]
    return Table(("setting", "value"), rows, text_columns=(0, 1))


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the members of nested mappings, under keys joined by dots."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, member in value.items():
        yield from flatten(member, f"{key}.{name}" if key else str(name))


def format_fact(value: Any) -> str:
    """Return a fact for a cell."""
    if isinstance(value, list | tuple):
        return ", ".join(map(format_fact, value))
    if isinstance(value, float):
        return f"{value:,.4g}"
    return format_value(value)


def recipe_parts(report: Report) -> list[Part]:
    """Return the recipe, and who wrote which of its values."""
    values = report["values"]
    defaults = [one for one in values if one["where"] == "default"]
    written = [one for one in values if one["where"] != "default"]
    lines = []
    if values:
        lines.append(f"{len(written)} values are written, {len(defaults)} are defaults.")
    return [
        Bullets(lines),
        values_table(WRITTEN, written, "where"),
        values_table(DEFAULTS, defaults, "owner"),
        Code(report["recipe"], "toml"),
    ]


def values_table(header: tuple[str, ...], values: list[dict[str, Any]], source: str) -> Table:
    """Return values of the recipe and their source."""
    rows = [[one["key"], format_value(one["value"]), one[source]] for one in values]
    return Table(header, rows, text_columns=range(len(header)))


def command_parts(report: Report) -> list[Part]:
    """Return the command, and the time that its runs took."""
    seconds = sum(arm["seconds"] for arm in report["arms"])
    spent = f"Training of the runs of the verdict, summed over runs: {format_duration(seconds)}."
    return [Code(report["command"]), Bullets([spent])]
