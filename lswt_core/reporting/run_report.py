"""report.html of a run, made from the files of its directory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.reporting.html import image, nested_tables, page, section
from lswt_core.reporting.metrics_log import read_metrics
from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_duration

COLUMNS = {  # of the table of evaluations: metric -> heading, format
    "step": ("step", ",d"),
    "eval/loss": ("loss", ".4f"),
    "eval/perplexity": ("perplexity", ",.2f"),
    "eval/accuracy": ("accuracy", ".2%"),
    "eval/bits_per_byte": ("bits per byte", ".4f"),
    "eval/unigram_perplexity": ("unigram perplexity", ",.1f"),
    "eval/tokens": ("held-out tokens", ",.0f"),
}


def write_report(run: Path) -> Path:
    """Write report.html from whatever of the run directory exists."""
    metrics = run / "metrics.jsonl"
    entries = read_metrics(metrics) if metrics.exists() else []
    name, summary = escape(run.resolve().name), summarize_run(entries)
    recipe = render_text_file(run / "recipe.toml", "recipe")
    sections = [
        f'<h1>{name}</h1><p class="verdict">{escape(summary)}</p>',
        render_curves(run / "curves.png", summary),
        section("Evaluations on held-out text", render_evaluations(entries)),
        section("Sample", render_text_file(run / "sample.txt", "sample")),
        *render_environment(run / "environment.json"),
        section("Recipe, every default written out", recipe, folded=True),
    ]
    write_atomically(run / "report.html", page(name, sections).encode())
    return run / "report.html"


def summarize_run(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return a run's result in a sentence or two."""
    trained = [entry for entry in entries if "loss" in entry]
    evaluated = [entry for entry in entries if entry.get("eval/loss") is not None]
    if not trained and not evaluated:
        return "Nothing was logged yet."
    sentences = ["The model was not evaluated on held-out text."]
    if evaluated:
        sentences = [summarize_evaluation(evaluated[-1])]
    if trained:
        sentences.append(summarize_training(trained[-1]))
    return " ".join(sentences)


def summarize_training(entry: Mapping[str, Any]) -> str:
    """Return steps, tokens, time and the last training loss as a sentence."""
    amounts = [f"{entry['step']:,} steps"]
    if entry.get("tokens"):
        amounts.append(f"{entry['tokens']:,.0f} tokens")
    if entry.get("seconds"):
        amounts.append(f"{format_duration(entry['seconds'])} of training")
    loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"
    return f"{', '.join(amounts)}; last training loss {loss}."


def summarize_evaluation(entry: Mapping[str, Any]) -> str:
    """Return held-out perplexity and how it compares with the unigram baseline's."""
    loss = entry["eval/loss"]
    perplexity = math.exp(min(loss, 700.0))
    result = f"Held-out perplexity {perplexity:,.2f} (loss {loss:.4f}) at step {entry['step']:,}"
    unigram = entry.get("eval/unigram_perplexity")
    if unigram is None:
        return f"{result}."
    if perplexity >= unigram:
        return f"{result}, not below the unigram baseline ({unigram:,.1f})."
    return (
        f"{result}, {unigram / perplexity:,.1f} times lower than the unigram baseline"
        f" ({unigram:,.1f})."
    )


def render_curves(path: Path, summary: str) -> str:
    """Return the curves, or a sentence that there are none."""
    if not path.exists():
        return '<p class="quiet">curves.png is missing: no picture was drawn.</p>'
    alt = (
        "Curves over training steps: training and held-out loss in nats per token, learning rate,"
        f" gradient norm, tokens per second. {summary}"
    )
    return image(path.read_bytes(), alt)


def render_text_file(path: Path, css_class: str) -> str:
    """Return a text file's content; empty if there is no file."""
    if not path.exists():
        return ""
    return f'<pre class="{css_class}">{escape(path.read_text(encoding="utf-8"))}</pre>'


def render_evaluations(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of evaluations, with the columns that were logged."""
    evaluations = [entry for entry in entries if "eval/loss" in entry]
    if not evaluations:
        return ""
    names = [name for name in COLUMNS if any(name in entry for entry in evaluations)]
    rows = []
    for entry in evaluations:
        rows.append([format_metric(entry.get(name), COLUMNS[name][1]) for name in names])
    return Table([COLUMNS[name][0] for name in names], rows, text_columns=()).html()


def format_metric(value: float | None, form: str) -> str:
    """Return a metric as text; empty where it was not logged or not finite."""
    return "" if value is None else format(value, form)


def render_environment(path: Path) -> list[str]:
    """Return the sections about parameters and about the environment of a run."""
    if not path.exists():
        return []
    environment = json.loads(path.read_text(encoding="utf-8"))
    parameters = environment.pop("parameters", None)
    counts = render_parameters(parameters) if parameters else ""
    return [
        section("Parameters", counts),
        section("Environment", nested_tables(environment), folded=True),
    ]


def render_parameters(parameters: Mapping[str, Any]) -> str:
    """Return the table of parameters by component."""
    total, trainable = parameters["total"], parameters["trainable"]
    rows = []
    for component, count in parameters["by_component"].items():
        rows.append([component, f"{count:,}", f"{count / max(total, 1):.1%}"])
    rows.append(["total", f"{total:,}", ""])
    rows.append(["trainable", f"{trainable:,}", f"{trainable / max(total, 1):.1%}"])
    return Table(["component", "parameters", "share"], rows).html()
