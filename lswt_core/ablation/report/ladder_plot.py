"""report-ladder.png: loss over training compute with fitted laws, differences, speedups."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lswt_core.ablation.report.loss_tables import Report
from lswt_core.ablation.report.plots import (
    COLOURS,
    DASHES,
    MAX_CURVES,
    draw_legend,
    shorten,
    tidy_axes,
)
from lswt_core.reporting.curves import new_figure, render_png, set_title

SHIFT = 0.12  # between the arms at one size, in sizes
MOST_WORTH = 10.0  # a factor; bars beyond leave the picture
WORTH_TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
MOST_TICKS = 9
Entry = dict[str, Any]


def plot_ladder(report: Report) -> bytes:
    """Return a PNG: losses and laws above; below, differences and worth by size."""
    figure = new_figure(7.0)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.25, 1.0])
    ladder = report["ladder"]
    draw_laws(figure.add_subplot(grid[0, :]), ladder)
    draw_by_rung(figure.add_subplot(grid[1, 0]), ladder, differences, "loss - baseline's, nats")
    worth = figure.add_subplot(grid[1, 1])
    draw_by_rung(worth, ladder, speedups, "worth: factor of compute")
    scale_worth(worth)
    set_title(figure, report["name"])
    return render_png(figure)


def draw_laws(axes: Any, ladder: Entry) -> None:
    """Draw each arm's mean losses over training compute, its runs, and its law up to the next
    size; the law of the baseline is that of its fit with the first arm.
    """
    names = [arm["name"] for arm in ladder["rungs"][0]["report"]["arms"]][:MAX_CURVES]
    for number, name in enumerate(names):
        arms = [rung["report"]["arms"][number] for rung in ladder["rungs"]]
        known = [arm for arm in arms if arm["training_flops"] and arm["final_loss"]["mean"]]
        colour = COLOURS[number % len(COLOURS)]
        for arm in known:
            values = [value for value in arm["final_loss"]["values"] if value is not None]
            at = [arm["training_flops"]] * len(values)
            axes.plot(at, values, "_", color=colour, markersize=7, alpha=0.45)
        style = {"color": colour, "markersize": 6}
        means = [arm["final_loss"]["mean"] for arm in known]
        axes.plot([arm["training_flops"] for arm in known], means, "o", **style)
        dashes = DASHES[number % len(DASHES)]
        axes.plot([], [], color=colour, linestyle=dashes, marker="o", label=shorten(name, 40))
        draw_law(axes, ladder["arms"][max(number - 1, 0)], min(number, 1), known, number)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs of a run (ticks: seeds; thin beyond the data: the next size)")
    axes.set_ylabel("held-out loss (nats per token)")
    draw_legend(axes)


def draw_law(axes: Any, one: Entry, side: int, known: list[Entry], number: int) -> None:
    """Draw the law of an arm, or (``side`` 0) of the baseline beside it."""
    law, beyond = one["law"], one["next"]
    if law is None or law["alpha"]["value"] is None or not known:
        return
    ends = [arm["training_flops"] for arm in known]
    ratio = beyond["flops"] / one_flops(known)
    for low, high, width in ((ends[0], ends[-1], 1.6), (ends[-1], ends[-1] * ratio, 0.8)):
        at = np.geomspace(low, high, 60)
        powers = (at / law["reference_flops"]) ** -law["alpha"]["value"]
        losses = law["l_inf"]["value"] + law["a"][side]["value"] * powers
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        axes.plot(at, losses, linewidth=width, **style)


def one_flops(known: list[Entry]) -> float:
    """Return the training FLOPs at the largest size."""
    return float(known[-1]["training_flops"])


def differences(one: Entry) -> list[tuple[float | None, Any]]:
    """Return an arm's difference and interval at every size."""
    return [(comparison["delta"], comparison["ci95"]) for comparison in one["comparisons"]]


def speedups(one: Entry) -> list[tuple[float | None, Any]]:
    """Return what an arm is worth, and the interval, at every size."""
    if one["speedup"] is None:
        return []
    return [(worth["value"], worth["ci95"]) for worth in one["speedup"]["by_rung"]]


def draw_by_rung(axes: Any, ladder: Entry, numbers: Any, label: str) -> None:
    """Draw a number of every arm at every size, with its interval."""
    axes.axhline(1 if numbers is speedups else 0, color="#000000", linewidth=1)
    arms = ladder["arms"][: MAX_CURVES - 1]
    for number, one in enumerate(arms, 1):
        shift = SHIFT * (number - (len(arms) + 1) / 2)
        colour = COLOURS[number % len(COLOURS)]
        for rung, (value, ends) in enumerate(numbers(one)):
            if ends is not None:
                low, high = (bound(end, side) for side, end in enumerate(ends))
                axes.plot([rung + shift] * 2, [low, high], color=colour, linewidth=2.2, alpha=0.6)
            if value is not None:
                axes.plot(rung + shift, value, "o", color=colour, markersize=6)
    axes.set_xticks(range(len(ladder["rungs"])), [rung["name"] for rung in ladder["rungs"]])
    axes.set_xlim(-0.5, len(ladder["rungs"]) - 0.5)
    axes.set_xlabel("size (bars: 95 % intervals)")
    axes.set_ylabel(label)
    tidy_axes(axes)


def bound(end: float | None, side: int) -> float:
    """Return the end of an interval; far outside of the picture where it is unbounded."""
    if end is None:
        return MOST_WORTH**3 if side else MOST_WORTH**-3
    return end


def pick_ticks(low: float, high: float) -> list[float]:
    """Return those of WORTH_TICKS, 1 among them, whose labels do not overlap on an axis."""
    apart, ticks = math.log(high / low) / MOST_TICKS, [1.0]
    for tick in WORTH_TICKS:
        distances = [abs(math.log(tick / other)) for other in ticks]
        if low <= tick <= high and min(distances) >= apart:
            ticks.append(tick)
    return ticks


def scale_worth(axes: Any) -> None:
    """Give factors a logarithmic axis of at most MOST_WORTH to both sides."""
    low, high = axes.get_ylim()
    low, high = max(low, 1 / MOST_WORTH), min(high, MOST_WORTH)
    low, high = min(low, 0.8), max(high, 1.25)
    axes.set_yscale("log")
    ticks = pick_ticks(low, high)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
