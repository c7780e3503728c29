"""The figure of tuning: loss against the tuned value, a line for each arm."""

from __future__ import annotations

from typing import Any

from lswt_core.ablation.report.loss_tables import Report
from lswt_core.ablation.report.plots import (
    COLOURS,
    DASHES,
    MAX_CURVES,
    draw_legend,
    shorten,
)
from lswt_core.reporting.curves import new_figure, render_png, set_title

LEGEND = " (diamond: chosen; ring: the recipe's, at the upper edge if above; x: diverged)"


def plot_tuning(report: Report) -> bytes:
    """Return a PNG: a panel for each tuned option."""
    tuning = report["tuning"]
    figure = new_figure(3.8 * len(tuning["options"]))
    panels = figure.subplots(len(tuning["options"]), 1, squeeze=False)[:, 0]
    for number, (axes, option) in enumerate(zip(panels, tuning["options"], strict=True)):
        draw_option(axes, tuning["arms"][:MAX_CURVES], number)
        axes.set_xlabel(f"{option['key']}{LEGEND}")
        axes.set_ylabel("loss on documents for choosing\n(nats per token)")
    set_title(figure, f"{report['name']}: every arm tuned with the same effort")
    return render_png(figure)


def draw_option(axes: Any, arms: list[dict[str, Any]], number: int) -> None:
    """Draw the sensitivity curves of all arms for one option."""
    axes.set_xscale("log")
    chosen = [arm["chosen"][number] for arm in arms]
    means = [
        {point["value"]: point["mean"] for point in one["curve"] if point["mean"] is not None}
        for one in chosen
    ]
    high = 1.0
    if any(means):
        seeds = [loss for one in chosen for point in one["curve"] for loss in point["losses"]]
        low, high = limit_losses([loss for loss in seeds if loss is not None])
        axes.set_ylim(low, high)
    for index, (arm, one, curve) in enumerate(zip(arms, chosen, means, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        style = {"linestyle": DASHES[index % len(DASHES)], "linewidth": 1.7}
        axes.plot([*curve], [*curve.values()], color=colour, label=shorten(arm["arm"], 26), **style)
        draw_points(axes, colour, one, {value: min(mean, high) for value, mean in curve.items()})
    draw_legend(axes)


def draw_points(axes: Any, colour: str, one: dict[str, Any], means: dict[float, float]) -> None:
    """Draw every seed, failures (at the upper edge), the chosen value and the recipe's; ``means``
    are cut off at the upper edge.
    """
    at_edge = {"color": colour, "clip_on": False}
    for point in one["curve"]:
        losses = [loss for loss in point["losses"] if loss is not None]
        axes.plot([point["value"]] * len(losses), losses, ".", color=colour, markersize=4)
        if point["mean"] is None:
            axes.plot(point["value"], axes.get_ylim()[1], "x", **at_edge)
    if one["best_point"] in means:
        axes.plot(one["value"], means[one["best_point"]], "D", color=colour, markersize=8)
    if one["own"] in means:
        ring = {"markerfacecolor": "none", "markeredgewidth": 1.5, "markersize": 11}
        axes.plot(one["own"], means[one["own"]], "o", **ring, **at_edge)


def limit_losses(losses: list[float]) -> tuple[float, float]:
    """Return limits that cut off losses far above the others, so that small differences show."""
    ordered = sorted(losses)
    low, middle = ordered[0], ordered[len(ordered) // 2]
    spread = max(middle - low, 1e-3)
    return low - 0.15 * spread, min(ordered[-1], middle + 2 * spread) + 0.15 * spread
