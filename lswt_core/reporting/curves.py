"""curves.png: loss, learning rate, gradient norm and throughput of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from lswt_core.errors import LswtError
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.reporting.metrics_log import Series, read_metrics, series, smooth

TRAINING, HELD_OUT, BASELINE, QUIET = "#2f6db3", "#d1495b", "#7a7a7a", "#444444"
WIDTH = 8.5  # inches; text of 9 points stays legible where a page shows it 600 pixels wide
COLUMNS = 2  # of small panels
PANELS = {  # metric -> title of its panel, which is its unit too
    "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens per second",
    "optimizer/unclipped_share": "un-clipped share of the update",
}


class ReportUnavailable(LswtError):
    """Curves cannot be drawn: matplotlib is not installed."""

    exit_code = 3


def write_curves(run: Path) -> Path | None:
    """Draw curves.png in a run directory; None if nothing was logged yet.

    Raises ReportUnavailable without matplotlib.
    """
    require_matplotlib("curves.png")
    metrics = run / "metrics.jsonl"
    entries = read_metrics(metrics) if metrics.exists() else []
    if not entries:
        return None
    panels = find_panels(entries)
    rows = -(-len(panels) // COLUMNS)
    figure = new_figure(4.2 + 2.3 * rows)
    grid = figure.add_gridspec(1 + rows, COLUMNS, height_ratios=[2.0] + [1.0] * rows)
    draw_loss(figure.add_subplot(grid[0, :]), entries)
    for index, (title, curve) in enumerate(panels):
        axes = figure.add_subplot(grid[1 + index // COLUMNS, index % COLUMNS])
        draw_panel(axes, title, curve)
    set_title(figure, run.resolve().name)
    write_atomically(run / "curves.png", render_png(figure))
    return run / "curves.png"


def require_matplotlib(picture: str) -> None:
    """Raise ReportUnavailable, which names a picture's file, if matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ReportUnavailable(
            f"{picture} was not drawn, matplotlib is missing: pip install 'lswt-core[report]'"
        ) from error


def new_figure(height: float, width: float = WIDTH) -> Any:
    """Return an empty figure of ``width`` x ``height`` inches that needs no display."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=150, layout=layout)


def set_title(figure: Any, title: str) -> None:
    """Put a title above all panels."""
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")


def render_png(figure: Any) -> bytes:
    """Return a figure as the content of a PNG file; equal figures give equal bytes."""
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def find_panels(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, Series]]:
    """Return title and curve of every small panel: PANELS and auxiliary losses that were logged."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    auxiliary = [name for name in names if name.startswith("loss/")]
    titles = PANELS | {name: f"auxiliary loss: {name.removeprefix('loss/')}" for name in auxiliary}
    curves = [(title, series(entries, name)) for name, title in titles.items()]
    return [(title, curve) for title, curve in curves if curve.steps]


def draw_loss(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """Draw training loss, held-out loss, and the loss of the unigram baseline."""
    training, held_out = series(entries, "loss"), series(entries, "eval/loss")
    axes.plot(*training, color=TRAINING, alpha=0.25, linewidth=0.9)
    axes.plot(
        training.steps,
        smooth(training.values),
        color=TRAINING,
        linewidth=1.8,
        label="training (line: running mean)",
    )
    if held_out.steps:
        style = {"linewidth": 1.4, "marker": "o", "markersize": 4.5}
        axes.plot(*held_out, color=HELD_OUT, label="held-out", **style)
    draw_unigram_baseline(axes, series(entries, "eval/unigram_perplexity"))
    axes.set_xlabel(label_steps(entries))
    axes.set_ylabel("loss (nats per token)")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False, borderaxespad=0.2
    )
    tidy_axes(axes)


def draw_unigram_baseline(axes: Any, perplexities: Series) -> None:
    """Draw the unigram baseline's loss as a horizontal line."""
    if not perplexities.values:
        return
    level = math.log(perplexities.values[-1])
    label = f"unigram baseline ({level:.2f})"
    axes.axhline(level, color=BASELINE, linewidth=1.2, linestyle=(0, (5, 4)), label=label)


def label_steps(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the label of an axis of steps, with the tokens of a step where they are known."""
    for entry in reversed(entries):
        if entry.get("tokens") and entry["step"]:
            return f"step ({entry['tokens'] / entry['step']:,.0f} tokens each)"
    return "step"


def draw_panel(axes: Any, title: str, curve: Series) -> None:
    """Draw one metric over the run; all but the learning rate are smoothed."""
    axes.plot(*curve, color=QUIET, alpha=0.3, linewidth=0.8)
    line = curve.values
    if title != PANELS["lr"]:
        line = smooth(curve.values)
    axes.plot(curve.steps, line, color=QUIET, linewidth=1.4)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylim(bottom=min(0.0, *curve.values), top=1.05 * max(curve.values) or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: format_tick(value))
    tidy_axes(axes)


def format_tick(value: float) -> str:
    """Return the label of a tick."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:g}"


def tidy_axes(axes: Any) -> None:
    """Draw a light frame, and whole step numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.margins(x=0.01)
