"""The picture of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lswt_core.reporting.curves import new_figure, render_png, require_matplotlib, set_title

PICTURE = "evaluation.png"
# The palette of Okabe and Ito, for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LONGEST_NAME = 32  # characters of a text's name in a legend; a wide one leaves no room for axes


def plot_evaluation(report: dict[str, Any]) -> bytes:
    """Return a PNG with four panels, and one more for recall tasks. Raises ReportUnavailable
    without matplotlib.
    """
    require_matplotlib(PICTURE)
    has_recall = any(text["recall"] for text in report["texts"].values())
    rows = 3 if has_recall else 2
    figure = new_figure(3.1 * rows)
    grid = figure.subplots(rows, 2)
    for colour, (name, text) in zip(
        COLOURS * (1 + len(report["texts"])), report["texts"].items(), strict=False
    ):
        draw_memory(grid[0, 0], text, colour, name)
        draw_positions(grid[0, 1], text, colour, name)
        draw_contexts(grid[1, 0], text, colour, name)
        draw_document(grid[1, 1], text, colour, name)
        if has_recall:
            draw_recall(grid[2, 0], text, colour, name)
    label(grid[0, 0], "memory (tokens)", "gain over no memory (nats)")
    label(grid[0, 1], "position in the segment, from", "gain over no memory (nats)")
    label(grid[1, 0], "context, cold restarts (tokens)", "loss over the longest's (nats)")
    label(grid[1, 1], "tokens since the document's start, from", "loss (nats per token)")
    if has_recall:
        label(grid[2, 0], "segments between fact and question", "accuracy of answers")
        grid[2, 0].set_ylim(0, 1.05)
        grid[2, 1].set_axis_off()
    set_title(figure, str(report["model"]))
    return render_png(figure)


def draw_memory(axes: Any, text: dict[str, Any], colour: str, name: str) -> None:
    """Draw the gain by memory length."""
    points = [point for point in text["memory"] or [] if point["memory"] is not None]
    entries = [point["gain"] for point in points]
    draw(axes, [point["memory"] for point in points], entries, colour, name)


def draw_positions(axes: Any, text: dict[str, Any], colour: str, name: str) -> None:
    """Draw the gain of the trained memory by position in the segment."""
    points = text["memory"][-1]["by_position"] if text["memory"] else []
    draw(axes, [one["from"] for one in points], points, colour, name)


def draw_contexts(axes: Any, text: dict[str, Any], colour: str, name: str) -> None:
    """Draw what shorter contexts than the longest cost."""
    context = text["effective_context"]
    points = context["losses"] if context else []
    gaps = [one["over_longest"] for one in points]
    draw(axes, [one["context"] for one in points], gaps, colour, name)


def draw_document(axes: Any, text: dict[str, Any], colour: str, name: str) -> None:
    """Draw losses by tokens since the document's start."""
    points = text["by_position"]
    draw(axes, [one["from"] for one in points], points, colour, name)


def draw_recall(axes: Any, text: dict[str, Any], colour: str, name: str) -> None:
    """Draw the accuracy of answers by distance, and chance as a dotted line."""
    if text["recall"] is None:
        return
    entries = [point["accuracy"] for point in text["recall"]]
    draw(axes, [point["distance"] for point in text["recall"]], entries, colour, name)
    chance, shown = text["recall_chance"]["accuracy"], f"chance, {shorten(name)}"
    axes.axhline(chance, color=colour, linestyle=":", linewidth=1.2, label=shown)


def draw(
    axes: Any, at: Sequence[float], points: Sequence[dict[str, Any]], colour: str, name: str
) -> None:
    """Draw means and their intervals."""
    if not points:
        return
    means = [one["value"] for one in points]
    axes.plot(at, means, "o-", color=colour, label=shorten(name), markersize=4)
    if all(one["interval"] is not None for one in points):
        low, high = zip(*(one["interval"] for one in points), strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def shorten(name: str) -> str:
    """Return a name that a legend has room for: the end of a long path."""
    return name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}"


def label(axes: Any, across: str, up: str) -> None:
    """Name the axes of a panel; one without a curve says so."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if not axes.lines:
        axes.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#000000", alpha=0.08, linewidth=0.8)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8.5)
