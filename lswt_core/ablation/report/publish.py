"""Writes the report of a comparison, or of a ladder: report.json, report.md, report.html, pictures
and report-curves.csv.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from lswt_core.ablation.comparison import Comparison
from lswt_core.ablation.report.comparison_report import headline_report, make_comparison_report
from lswt_core.ablation.report.curve_data import CURVES, format_curves, name_studies
from lswt_core.ablation.report.ladder_plot import plot_ladder
from lswt_core.ablation.report.ladder_report import make_ladder_report
from lswt_core.ablation.report.ladder_text import LADDER_PICTURE
from lswt_core.ablation.report.loss_tables import Report
from lswt_core.ablation.report.page import (
    CURVES_PICTURE,
    HELD_OUT_PICTURE,
    PICTURE,
    render_markdown,
    render_page,
    render_terminal,
)
from lswt_core.ablation.report.plots import plot_curves, plot_differences, plot_held_out
from lswt_core.ablation.report.tuning_plot import plot_tuning
from lswt_core.ablation.report.tuning_text import TUNING_PICTURE
from lswt_core.ablation.run_ladder import LadderStudy
from lswt_core.ablation.runs.store import write_json
from lswt_core.errors import UsageError
from lswt_core.plugin_api.atomic_write import make_output_directory, write_atomically

logger = logging.getLogger(__name__)


def publish(comparison: Comparison, directory: Path) -> str:
    """Write the report; return what is printed on the terminal. A picture that cannot be drawn
    costs the picture alone, and the report says so.
    """
    whole = make_comparison_report(comparison)
    report = headline_report(whole)
    pictures = draw_pictures(comparison, report)
    write_json(directory / "report.json", whole)
    write_curves(directory, format_curves(name_studies(comparison)))
    return write_pages(report, pictures, directory)


def publish_ladder(study: LadderStudy, directory: Path) -> str:
    """Write the report of a ladder, which is that of its largest rung and what all rungs say, as
    ``publish`` does.
    """
    report = make_ladder_report(study)
    ladder = draw(report, LADDER_PICTURE, lambda: plot_ladder(report))
    top = report["ladder"]["rungs"][-1]["report"]
    pictures = draw_pictures(study.rungs[-1].comparison, top)
    if ladder:
        pictures[LADDER_PICTURE] = ladder
    named = [
        one for rung in study.rungs for one in name_studies(rung.comparison, f" at {rung.name}")
    ]
    write_json(directory / "report.json", report)
    write_curves(directory, format_curves(named))
    return write_pages(report, pictures, directory)


def write_curves(directory: Path, curves: str) -> None:
    """Write the curves as data."""
    write_atomically(directory / CURVES, curves.encode())


def write_pages(report: Report, pictures: dict[str, bytes], directory: Path) -> str:
    """Write page, Markdown and pictures; return what is printed."""
    for name, picture in pictures.items():
        write_atomically(directory / name, picture)
    write_atomically(directory / "report.md", render_markdown(report, pictures).encode())
    write_atomically(directory / "report.html", render_page(report, pictures).encode())
    return f"{render_terminal(report)}\n\nreport: {directory / 'report.html'}"


def draw_pictures(comparison: Comparison, report: Report) -> dict[str, bytes]:
    """Return the pictures (PNG) of a comparison that can be drawn, by file name."""
    study = comparison.headline
    drawn = {
        PICTURE: draw(report, PICTURE, lambda: plot_differences(report)),
        CURVES_PICTURE: draw(report, CURVES_PICTURE, lambda: plot_curves(study)),
        HELD_OUT_PICTURE: draw(report, HELD_OUT_PICTURE, lambda: plot_held_out(study)),
    }
    if comparison.tuning is not None:
        drawn[TUNING_PICTURE] = draw(report, TUNING_PICTURE, lambda: plot_tuning(report))
    return {name: picture for name, picture in drawn.items() if picture}


def draw(report: Report, name: str, plot: Callable[[], bytes | None]) -> bytes | None:
    """Return a picture (PNG); None, and a reason in the baseline's "unknown", if it fails: the runs
    are made by now.
    """
    try:
        return plot()
    except Exception as error:
        logger.exception("%s cannot be drawn", name)
        report["arms"][0]["unknown"][name] = f"{type(error).__name__}: {error}"
        return None


def claim(directory: Path, fingerprint: str) -> None:
    """Make the report's directory this ablation's. Raises UsageError if it holds another one's
    report, or cannot be written to.
    """
    make_output_directory(directory, "--out")
    path = directory / "ablation.json"
    if claimed(path) not in (None, fingerprint):
        raise UsageError(
            f"{directory} holds the report of another ablation\n  fix: choose another --out"
        )
    write_json(path, {"fingerprint": fingerprint})


def claimed(path: Path) -> str | None:
    """Return whose report a directory holds; None if nobody's, or if that cannot be read."""
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged and is written anew: %s", path, error)
        return None
