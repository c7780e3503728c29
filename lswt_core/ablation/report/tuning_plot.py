"""The figure of tuning: loss against the tuned value, a line for each arm."""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.report.plots import (
    COLOURS,
    DASHES,
    MAX_CURVES,
    draw_legend,
    shorten,
)
from lswt_core.ablation.report.tables import Report
from lswt_core.reporting.curves import new_figure, render_png, set_title


def plot_tuning(report: Report) -> bytes:
    """Return a PNG: a panel for each tuned option."""
    tuning = report["tuning"]
    figure = new_figure(3.8 * len(tuning["options"]))
    panels = figure.subplots(len(tuning["options"]), 1, squeeze=False)[:, 0]
    for number, (axes, option) in enumerate(zip(panels, tuning["options"], strict=True)):
        draw_option(axes, tuning["arms"][:MAX_CURVES], number)
        axes.set_xlabel(f"{option['key']} (large mark: chosen; open ring: the recipe's value)")
        axes.set_ylabel("loss on documents for choosing\n(nats per token)")
    set_title(figure, f"{report['name']}: every arm tuned with the same effort")
    return render_png(figure)


def draw_option(axes: Any, arms: list[dict[str, Any]], number: int) -> None:
    """Draw the sensitivity curves of all arms for one option."""
    axes.set_xscale("log")
    shown = []
    for index, arm in enumerate(arms):
        one = arm["chosen"][number]
        points = [(point["value"], point["mean"]) for point in one["curve"]]
        known = [(value, mean) for value, mean in points if mean is not None]
        if known:
            draw_curve(axes, index, arm["arm"], one, known)
            shown += [mean for _, mean in known]
        draw_failed(axes, index, [value for value, mean in points if mean is None])
    if shown:
        limit_losses(axes, shown)
    draw_legend(axes)


def draw_curve(
    axes: Any, index: int, name: str, one: dict[str, Any], known: list[tuple[float, float]]
) -> None:
    """Draw an arm's curve, every seed, the chosen value and the recipe's."""
    colour, means = COLOURS[index % len(COLOURS)], dict(known)
    style = {"color": colour, "linestyle": DASHES[index % len(DASHES)], "linewidth": 1.7}
    axes.plot(*zip(*known, strict=True), label=shorten(name, 26), **style)
    for point in one["curve"]:
        losses = [loss for loss in point["losses"] if loss is not None]
        axes.plot([point["value"]] * len(losses), losses, ".", color=colour, markersize=4)
    if one["value"] in means:
        axes.plot(one["value"], means[one["value"]], "D", color=colour, markersize=8)
    if one["own"] in means:
        ring = {"markerfacecolor": "none", "markeredgewidth": 1.5, "markersize": 11}
        axes.plot(one["own"], means[one["own"]], "o", color=colour, **ring)


def draw_failed(axes: Any, index: int, values: list[float]) -> None:
    """Mark points whose runs all failed, at the upper edge."""
    for value in values:
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(value, 0.97, "x", color=COLOURS[index % len(COLOURS)], **place)


def limit_losses(axes: Any, losses: list[float]) -> None:
    """Cut off losses that are far above the others, so that differences at the bottom show."""
    ordered = sorted(losses)
    low, middle = ordered[0], ordered[len(ordered) // 2]
    spread = max(middle - low, 1e-3)
    axes.set_ylim(low - 0.15 * spread, min(ordered[-1], middle + 2 * spread) + 0.15 * spread)
