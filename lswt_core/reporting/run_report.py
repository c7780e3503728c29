"""A run directory as a picture and a page: curves.png and report.html, made from what the run left
there. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from lswt_core.errors import DataError, LswtError
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.reporting.html import image, nested, page, section, table

TRAINING, HELD_OUT, BASELINE, QUIET = "#2f6db3", "#d1495b", "#7a7a7a", "#444444"
PANELS = {  # metric -> title of its panel, which is its unit too
    "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens per second",
    "optimizer/unclipped_share": "un-clipped share of the update",
}
COLUMNS = {  # of the table of evaluations: metric -> heading, format
    "step": ("step", ",d"),
    "eval/loss": ("loss", ".4f"),
    "eval/perplexity": ("perplexity", ",.2f"),
    "eval/accuracy": ("accuracy", ".2%"),
    "eval/bits_per_byte": ("bits per byte", ".4f"),
    "eval/unigram_perplexity": ("unigram perplexity", ",.1f"),
    "eval/tokens": ("held-out tokens", ",.0f"),
}


class ReportUnavailable(LswtError):
    """Curves cannot be drawn because the library that draws them is not installed."""

    exit_code = 3


class Series(NamedTuple):
    """A metric over steps, where it was logged and finite."""

    steps: list[int]
    values: list[float]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, in order; a torn last line (a run that is still writing, or
    was killed) is left out.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    entries = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError(f"it is {line[:40]!r}")
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a JSON object: {error}") from error
        entries.append(entry)
    return entries


def series(entries: Iterable[Mapping[str, Any]], name: str) -> Series:
    """One metric of many entries."""
    points = [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
    return Series([step for step, _ in points], [value for _, value in points])


def smooth(values: Sequence[float]) -> list[float]:
    """A running mean that does not lag: its window is centred, a twenty-fifth of the curve wide,
    and narrower where it begins.
    """
    reach = len(values) // 50
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    windows = [
        (i - min(reach, i), min(i + min(reach, i) + 1, len(values))) for i in range(len(values))
    ]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in windows]


# ---------- curves


def write_curves(run: Path) -> Path | None:
    """Draw curves.png; None if nothing was logged yet. Raises ReportUnavailable without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ReportUnavailable(
            "curves.png was not drawn, matplotlib is missing: pip install 'lswt-core[report]'"
        ) from error
    entries = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    if not entries:
        return None
    panels = _panels(entries)
    rows = -(-len(panels) // 3)
    figure = Figure(
        figsize=(11, 4.6 + 2.5 * rows),
        dpi=130,
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
    )
    grid = figure.add_gridspec(1 + rows, 3, height_ratios=[2.0] + [1.0] * rows)
    _draw_loss(figure.add_subplot(grid[0, :]), entries)
    for index, (title, curve) in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[1 + index // 3, index % 3]), title, curve)
    figure.suptitle(run.resolve().name, x=0.012, ha="left", fontsize=13, fontweight="bold")
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    write_atomically(run / "curves.png", picture.getvalue())
    return run / "curves.png"


def _panels(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, Series]]:
    """The small panels: what was logged of the usual numbers, and every auxiliary loss."""
    auxiliary = dict.fromkeys(
        name for entry in entries for name in entry if name.startswith("loss/")
    )
    titles = PANELS | {name: f"auxiliary loss: {name.removeprefix('loss/')}" for name in auxiliary}
    found = ((title, series(entries, name)) for name, title in titles.items())
    return [(title, curve) for title, curve in found if curve.steps]


def _draw_loss(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """Training and held-out loss, and what the simplest model reaches."""
    training, held_out, baseline = (
        series(entries, name) for name in ("loss", "eval/loss", "eval/unigram_perplexity")
    )
    axes.plot(*training, color=TRAINING, alpha=0.25, linewidth=0.9)
    axes.plot(
        training.steps,
        smooth(training.values),
        color=TRAINING,
        linewidth=1.8,
        label="training (line: running mean)",
    )
    if held_out.steps:
        axes.plot(
            *held_out, color=HELD_OUT, linewidth=1.4, marker="o", markersize=4.5, label="held-out"
        )
    if baseline.values:
        level = math.log(baseline.values[-1])
        axes.axhline(
            level,
            color=BASELINE,
            linewidth=1.2,
            linestyle=(0, (5, 4)),
            label=f"unigram baseline ({level:.2f})",
        )
    sizes = [
        entry["tokens"] / entry["step"]
        for entry in entries
        if entry.get("tokens") and entry["step"]
    ]
    axes.set_xlabel(f"step ({sizes[-1]:,.0f} tokens each)" if sizes else "step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, borderaxespad=0.2
    )
    _tidy(axes)


def _draw_panel(axes: Any, title: str, curve: Series) -> None:
    """One number over the run."""
    axes.plot(*curve, color=QUIET, alpha=0.3, linewidth=0.8)
    exact = title == PANELS["lr"]
    axes.plot(
        curve.steps, curve.values if exact else smooth(curve.values), color=QUIET, linewidth=1.4
    )
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylim(bottom=min(0.0, *curve.values), top=1.05 * max(curve.values) or 1.0)
    axes.yaxis.set_major_formatter(
        lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"
    )
    _tidy(axes)


def _tidy(axes: Any) -> None:
    """A quiet frame and whole, readable step numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.margins(x=0.01)


# ---------- page


def write_report(run: Path) -> Path:
    """Write report.html: one file that needs nothing else, from whatever of the run directory
    exists.
    """
    metrics = run / "metrics.jsonl"
    entries = read_metrics(metrics) if metrics.exists() else []
    name = escape(run.resolve().name)
    sections = [
        f'<h1>{name}</h1><p class="verdict">{escape(verdict(entries))}</p>',
        _curves(run / "curves.png"),
        section("Evaluations on held-out text", _evaluations(entries)),
        section("Sample", _text(run / "sample.txt", "sample")),
        *_environment(run / "environment.json"),
        section(
            "Recipe, every default written out", _text(run / "recipe.toml", "recipe"), folded=True
        ),
    ]
    write_atomically(run / "report.html", page(name, sections).encode())
    return run / "report.html"


def verdict(entries: Sequence[Mapping[str, Any]]) -> str:
    """What came out of a run, in a sentence or two."""
    trained = [entry for entry in entries if "loss" in entry]
    tested = [entry for entry in entries if entry.get("eval/loss") is not None]
    if not trained and not tested:
        return "Nothing was logged yet."
    sentences = (
        [_quality(tested[-1])] if tested else ["The model was not evaluated on held-out text."]
    )
    if trained:
        last = trained[-1]
        effort = f"{last['step']:,} steps"
        effort += f", {last['tokens']:,.0f} tokens" if last.get("tokens") else ""
        effort += f", {duration(last['seconds'])} of training" if last.get("seconds") else ""
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        sentences.append(f"{effort}; last training loss {loss}.")
    return " ".join(sentences)


def _quality(entry: Mapping[str, Any]) -> str:
    loss = entry["eval/loss"]
    perplexity = math.exp(min(loss, 700.0))
    found = f"Held-out perplexity {perplexity:,.2f} (loss {loss:.4f}) at step {entry['step']:,}"
    baseline = entry.get("eval/unigram_perplexity")
    if baseline is None:
        return f"{found}."
    if perplexity >= baseline:
        return f"{found}, not below the unigram baseline ({baseline:,.1f})."
    return (
        f"{found}, {baseline / perplexity:,.1f} times lower than the unigram baseline"
        f" ({baseline:,.1f})."
    )


def duration(seconds: float) -> str:
    """A time as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _curves(path: Path) -> str:
    if not path.exists():
        return '<p class="quiet">curves.png is missing: no picture was drawn.</p>'
    return image(path.read_bytes(), "training curves")


def _text(path: Path, kind: str) -> str:
    return (
        f'<pre class="{kind}">{escape(path.read_text(encoding="utf-8"))}</pre>'
        if path.exists()
        else ""
    )


def _evaluations(entries: Sequence[Mapping[str, Any]]) -> str:
    """The table of evaluations, of the columns that were logged."""
    tested = [entry for entry in entries if "eval/loss" in entry]
    if not tested:
        return ""
    columns = {
        name: column for name, column in COLUMNS.items() if any(name in entry for entry in tested)
    }
    rows = [
        [
            "" if entry.get(name) is None else format(entry[name], style)
            for name, (_, style) in columns.items()
        ]
        for entry in tested
    ]
    return table(rows, [heading for heading, _ in columns.values()])


def _environment(path: Path) -> list[str]:
    """The table of parameters, and all else that is known about where the run ran."""
    if not path.exists():
        return []
    known = json.loads(path.read_text(encoding="utf-8"))
    parameters = known.pop("parameters", None)
    counted = ""
    if parameters:
        total = max(parameters["total"], 1)
        rows = [
            [part, f"{count:,}", f"{count / total:.1%}"]
            for part, count in parameters["by_component"].items()
        ]
        rows += [
            ["total", f"{parameters['total']:,}", ""],
            ["trainable", f"{parameters['trainable']:,}", f"{parameters['trainable'] / total:.1%}"],
        ]
        counted = table(rows, ["component", "parameters", "share"])
    return [
        section("Parameters", counted),
        section("Environment", f'<div class="plain">{nested(known)}</div>', folded=True),
    ]
