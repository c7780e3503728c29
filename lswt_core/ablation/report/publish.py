"""Writes the report of a comparison: report.json, report.md, report.html and pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from lswt_core.ablation.comparison import Comparison
from lswt_core.ablation.report.comparison_report import headline_report, make_comparison_report
from lswt_core.ablation.report.html_page import render_page
from lswt_core.ablation.report.plots import plot_held_out, plot_overview
from lswt_core.ablation.report.tables import Report
from lswt_core.ablation.report.text import PICTURE, render_markdown, render_terminal
from lswt_core.ablation.report.tuning_plot import plot_tuning
from lswt_core.ablation.report.tuning_text import TUNING_PICTURE
from lswt_core.ablation.runs.store import write_json
from lswt_core.errors import UsageError
from lswt_core.plugin_api.atomic_write import make_output_directory, write_atomically

logger = logging.getLogger(__name__)


def publish(comparison: Comparison, directory: Path) -> str:
    """Write the report; return what is printed on the terminal. A picture that cannot be drawn
    costs the picture alone, and the report says so.
    """
    whole, study = make_comparison_report(comparison), comparison.headline
    report = headline_report(whole)
    picture = draw(report, PICTURE, lambda: plot_overview(study, report)) or b""
    held_out = draw(report, "held-out curves", lambda: plot_held_out(study))
    tuning = None
    if comparison.tuning is not None:
        tuning = draw(report, TUNING_PICTURE, lambda: plot_tuning(report))
        write_atomically(directory / TUNING_PICTURE, tuning or b"")
    write_json(directory / "report.json", whole)
    write_atomically(directory / "report.md", render_markdown(report).encode())
    write_atomically(directory / PICTURE, picture)
    page = render_page(report, picture, held_out, tuning)
    write_atomically(directory / "report.html", page.encode())
    return f"{render_terminal(report)}\n\nreport: {directory / 'report.html'}"


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
