"""The figures of an ablation: paired differences with confidence intervals, training curves with
bands over seeds, loss by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from textwrap import fill
from typing import Any

from lswt_core.ablation.report.verdict import BETTER, EQUIVALENT, SMALL, UNRESOLVED, WORSE
from lswt_core.ablation.runs.outcome import ArmResult, Study
from lswt_core.reporting.curves import new_figure, render_png
from lswt_core.reporting.metrics_log import smooth

# The palette of Okabe and Ito, for colour-blind readers; dashes distinguish lines besides. The
# baseline is black.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))
MARKERS = {BETTER: "v", WORSE: "^", EQUIVALENT: "s", UNRESOLVED: "o", **dict.fromkeys(SMALL, "D")}
NARROW = 5.6  # inches
MAX_CURVES = 8  # arms in a plot of curves; more could not be distinguished
Curve = Sequence[tuple[float, float]]
FIRST = 0.5  # where 0 is drawn on a logarithmic axis of whole numbers
TRAINED = "tokens trained on (bands: lowest to highest seed)"
LABEL = 24  # characters of a line beside the axis


def plot_differences(report: dict[str, Any]) -> bytes:
    """Return a PNG: the difference of every arm, its interval and its seeds."""
    figure = new_figure(1.3 + 0.5 * len(report["comparisons"]), NARROW)
    draw_differences(figure.add_subplot(), report)
    return render_png(figure)


def plot_curves(study: Study) -> bytes:
    """Return a PNG: training curves, and loss by position."""
    figure = new_figure(3.6)
    label = "training loss (nats per token)"
    draw_curves(figure.add_subplot(1, 2, 1), study, training_curves, label)
    draw_positions(figure.add_subplot(1, 2, 2), study)
    return render_png(figure)


def plot_held_out(study: Study) -> bytes | None:
    """Return a PNG of held-out loss less the baseline's at the same seed, over the run; None if
    runs were evaluated only once.
    """
    baseline, *others = study.arms
    if not any(len(one.evaluations) > 1 for one in baseline.outcomes):
        return None
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    axes.axhline(0, color=COLOURS[0], linewidth=1.2, label="baseline")
    for number, arm in enumerate(others[: MAX_CURVES - 1], 1):
        draw_band(axes, held_out_differences(baseline, arm), number, arm.name)
    axes.set_xlabel(TRAINED)
    axes.set_ylabel("held-out loss - baseline's (nats)")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    tidy_axes(axes)
    return render_png(figure)


def held_out_differences(baseline: ArmResult, arm: ArmResult) -> list[Curve]:
    """Return, for each seed at which both finished, held-out loss less the baseline's by tokens."""
    curves: list[Curve] = []
    for one, other in arm.finished_pairs(baseline):
        before, after = dict(one.evaluations), other.evaluations
        curves.append([(at, loss - before[at]) for at, loss in after if at in before])
    return curves


def training_curves(arm: ArmResult) -> list[Curve]:
    """Return the smoothed training curves of an arm's runs."""
    curves: list[Curve] = []
    for one in arm.finished_runs():
        losses = smooth([loss for _, loss in one.curve])
        tokens = [tokens for tokens, _ in one.curve]
        curves.append(list(zip(tokens, losses, strict=True)))
    return curves


def position_curves(arm: ArmResult) -> list[Curve]:
    """Return held-out loss by preceding tokens; 0 is drawn at FIRST: the axis is logarithmic."""
    curves: list[Curve] = []
    for one in arm.finished_runs():
        curves.append([(max(position, FIRST), loss) for position, loss, _ in one.positions])
    return curves


def draw_differences(axes: Any, report: dict[str, Any]) -> None:
    """Draw a forest plot: each arm's difference in loss, its confidence interval, its seeds, and
    the margin of equivalence.
    """
    margin, comparisons = report["settings"]["margin"], report["comparisons"]
    axes.axvspan(-margin, margin, color="#56B4E9", alpha=0.18, linewidth=0)
    axes.axvline(0, color="#000000", linewidth=1)
    for height, one in enumerate(reversed(comparisons)):
        draw_difference(axes, height, one)
    labels = [label_comparison(one) for one in reversed(comparisons)]
    axes.set_yticks(range(len(comparisons)), labels)
    axes.set_ylim(-0.6, len(comparisons) - 0.4)
    axes.set_xlabel(
        "held-out loss - baseline's, nats (left is better)\n"
        f"bar: 95 % interval, ticks: seeds, band: margin {margin:g}"
    )
    tidy_axes(axes)


def draw_difference(axes: Any, height: float, one: dict[str, Any]) -> None:
    """Draw one arm of the forest plot."""
    if one["delta"] is None:
        text = "  unknown" if one["seeds"] else f"  {one['verdict']}"
        axes.annotate(text, (0, height), va="center", fontsize=9, color="#666666")
        return
    seeds = {"color": "#7F7F7F", "markersize": 7, "markeredgewidth": 1.2}
    axes.plot(one["values"], [height - 0.22] * len(one["values"]), "|", **seeds)
    if one["ci95"] is not None:
        bar = {"linewidth": 2.4, "solid_capstyle": "butt"}
        axes.plot(one["ci95"], [height] * 2, color="#0072B2", **bar)
    axes.plot(
        one["delta"], height, MARKERS.get(one["verdict"], "o"), color="#0072B2", markersize=7.5
    )


def label_comparison(one: dict[str, Any]) -> str:
    """Return an arm's name and verdict, for an axis."""
    verdict, failed = one["verdict"], one["failed"]["arm"]
    if failed:
        verdict += f", {failed} of {one['seeds'] + one['lost']} failed"
    return f"{shorten(one['arm'], LABEL)}\n{fill(verdict, LABEL)}"


def shorten(name: str, length: int = 30) -> str:
    """Return a name, cut to a length."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def draw_curves(
    axes: Any, study: Study, curves: Callable[[ArmResult], list[Curve]], label: str
) -> None:
    """Draw one line per arm, with a band over its seeds."""
    for number, arm in enumerate(study.arms[:MAX_CURVES]):
        draw_band(axes, curves(arm), number, arm.name)
    axes.set_xlabel(TRAINED)
    axes.set_ylabel(label)
    draw_legend(axes)


def draw_band(axes: Any, curves: list[Curve], number: int, name: str) -> None:
    """Draw the mean of an arm's curves where all of them have values, and a band from the lowest
    to the highest.
    """
    runs = [dict(curve) for curve in curves if curve]
    if not runs:
        return
    at = [x for x in runs[0] if all(x in run for run in runs)]
    values = [[run[x] for run in runs] for x in at]
    colour = COLOURS[number % len(COLOURS)]
    style = {"color": colour, "linestyle": DASHES[number % len(DASHES)], "linewidth": 1.7}
    axes.plot(at, list(map(fmean, values)), label=shorten(name, 26), **style)
    if len(runs) > 1:
        low, high = list(map(min, values)), list(map(max, values))
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_positions(axes: Any, study: Study) -> None:
    """Draw loss by the number of preceding tokens of the document."""
    draw_curves(axes, study, position_curves, "held-out loss (nats per token)")
    axes.set_xscale("log", base=2)
    last = axes.get_xlim()[1]
    ticks = [FIRST, *(4.0**power for power in range(16) if 4.0**power <= last)]
    axes.set_xticks(ticks, ["0", *(f"{tick:,.0f}" for tick in ticks[1:])])
    axes.set_xlabel("preceding tokens of the document, from")


def draw_legend(axes: Any) -> None:
    """Draw the names of lines, if there are any."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)
    tidy_axes(axes)


def tidy_axes(axes: Any) -> None:
    """Draw a light frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#000000", alpha=0.08, linewidth=0.8)
    axes.tick_params(labelsize=9)
