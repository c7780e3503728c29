"""The figures of an ablation: differences with their intervals, curves with bands over seeds, loss
by how much was read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from lswt_core.ablation.outcome import Arm, Study
from lswt_core.reporting.run_report import smooth

# Okabe and Ito's colours, told apart by colour-blind people; lines differ in their dashes besides.
# The baseline is black.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))
MARKS = {"better": "v", "worse": "^", "equivalent": "s", "not resolved": "o"}
WIDTH = 11.0  # inches
CURVES_SHOWN = 8  # arms; more would not be told apart
Rows = Sequence[tuple[float, float]]


def overview(study: Study, report: dict[str, Any]) -> bytes:
    """The picture of the whole: differences above, curves and loss by position below."""
    rows = len(report["comparisons"])
    figure = new_figure(2.2 + 0.45 * rows + 3.6)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.2 + 0.45 * rows, 3.6])
    draw_differences(figure.add_subplot(grid[0, :]), report)
    draw_curves(figure.add_subplot(grid[1, 0]), study, training, "training loss (nats per token)")
    draw_positions(figure.add_subplot(grid[1, 1]), study)
    seeds, steps = len(report["settings"]["seeds"]), report["settings"]["steps"]
    figure.suptitle(
        f"{report['name']}: {seeds} seeds, {steps:,} steps",
        x=0.012,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    return png(figure)


def held_out(study: Study) -> bytes | None:
    """Held-out loss over the run, as the difference to the baseline at the same seed; None where it
    was tested once only.
    """
    baseline, *others = study.arms
    if not any(len(one.evaluations) > 1 for one in baseline.outcomes):
        return None
    figure = new_figure(3.4)
    axes = figure.add_subplot()
    axes.axhline(0, color=COLOURS[0], linewidth=1.2, label="baseline")
    for number, arm in enumerate(others[: CURVES_SHOWN - 1], 1):
        draw_band(axes, differences(baseline, arm), number, arm.name)
    axes.set_xlabel("tokens")
    axes.set_ylabel("held-out loss - baseline's (nats)")
    legend(axes)
    return png(figure)


def differences(baseline: Arm, arm: Arm) -> list[Rows]:
    """Per seed at which both finished: tokens, and held-out loss less the baseline's."""
    found: list[Rows] = []
    for one, other in zip(baseline.outcomes, arm.outcomes, strict=True):
        if one.failure is other.failure is None:
            before = dict(one.evaluations)
            found.append(
                [
                    (tokens, loss - before[tokens])
                    for tokens, loss in other.evaluations
                    if tokens in before
                ]
            )
    return found


def done(arm: Arm) -> list[Any]:
    """The runs that came to an end."""
    return [one for one in arm.outcomes if one.failure is None]


def training(arm: Arm) -> list[Rows]:
    """The training curves of an arm's runs."""
    return [smoothed(one.curve) for one in done(arm)]


def by_position(arm: Arm) -> list[Rows]:
    """Loss by tokens read before, none of them a little left of one."""
    return [[(max(at, 0.5), loss) for at, loss, _ in one.positions] for one in done(arm)]


def smoothed(curve: Rows) -> Rows:
    """A curve's running mean."""
    return list(
        zip([tokens for tokens, _ in curve], smooth([loss for _, loss in curve]), strict=True)
    )


def draw_differences(axes: Any, report: dict[str, Any]) -> None:
    """A forest plot: every arm's difference in loss, its interval, every seed, and the margin
    within which it does not matter.
    """
    margin, comparisons = report["settings"]["margin"], report["comparisons"]
    axes.axvspan(-margin, margin, color="#56B4E9", alpha=0.18, linewidth=0)
    axes.axvline(0, color="#000000", linewidth=1)
    for height, one in enumerate(reversed(comparisons)):
        if one["delta"] is None:
            axes.annotate(
                "  failed" if not one["seeds"] else "  unknown",
                (0, height),
                va="center",
                fontsize=9,
                color="#666666",
            )
            continue
        axes.plot(
            one["values"],
            [height - 0.22] * len(one["values"]),
            "|",
            color="#7F7F7F",
            markersize=7,
            markeredgewidth=1.2,
        )
        if one["ci95"] is not None:
            axes.plot(
                one["ci95"], [height] * 2, color="#0072B2", linewidth=2.4, solid_capstyle="butt"
            )
        axes.plot(one["delta"], height, MARKS[one["verdict"]], color="#0072B2", markersize=7.5)
    axes.set_yticks(range(len(comparisons)), [label(one) for one in reversed(comparisons)])
    axes.set_ylim(-0.6, len(comparisons) - 0.4)
    axes.set_xlabel(
        "held-out loss - baseline's (nats per token; left is better; bar: 95 % interval, ticks:"
        f" seeds, band: margin {margin:g})"
    )
    tidy(axes)


def label(one: dict[str, Any]) -> str:
    """An arm's name and verdict, for an axis."""
    failed = one["failed"]["arm"]
    lost = f", {failed} of {one['seeds'] + one['lost']} failed" if failed else ""
    return f"{shorten(one['arm'])}\n{one['verdict']}{lost}"


def shorten(name: str, most: int = 34) -> str:
    """A name that fits."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def draw_curves(axes: Any, study: Study, curves: Callable[[Arm], list[Rows]], title: str) -> None:
    """One line an arm, with a band from the lowest to the highest seed."""
    for number, arm in enumerate(study.arms[:CURVES_SHOWN]):
        draw_band(axes, curves(arm), number, arm.name)
    axes.set_xlabel("tokens")
    axes.set_ylabel(title)
    legend(axes)


def draw_band(axes: Any, runs: list[Rows], number: int, name: str) -> None:
    """The mean of some runs over the tokens that all of them reached, and what lies between them."""
    runs = [run for run in runs if run]
    if not runs:
        return
    shared = [dict(run) for run in runs]
    at = [tokens for tokens, _ in runs[0] if all(tokens in run for run in shared)]
    values = [[run[tokens] for run in shared] for tokens in at]
    style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
    axes.plot(at, list(map(fmean, values)), linewidth=1.7, label=shorten(name, 26), **style)
    if len(runs) > 1:
        axes.fill_between(
            at,
            list(map(min, values)),
            list(map(max, values)),
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )


def draw_positions(axes: Any, study: Study) -> None:
    """Loss by how many tokens of its document a token could look back on."""
    draw_curves(axes, study, by_position, "held-out loss (nats per token)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "0")
    axes.set_xlabel("tokens of its document read before, from")


def legend(axes: Any) -> None:
    """Names of the lines."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)
    tidy(axes)


def tidy(axes: Any) -> None:
    """Quiet axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#000000", alpha=0.08, linewidth=0.8)
    axes.tick_params(labelsize=9)


def new_figure(height: float) -> Any:
    """An empty figure, drawn without a screen."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(
        figsize=(WIDTH, height), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )


def png(figure: Any) -> bytes:
    """A figure as the content of a file; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
