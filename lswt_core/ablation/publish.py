"""Writes the report of a study: report.json, report.md, report.html and report.png."""

from __future__ import annotations

from pathlib import Path

from lswt_core.ablation.compare import make_report
from lswt_core.ablation.html_page import render_page
from lswt_core.ablation.outcome import Study
from lswt_core.ablation.plots import plot_held_out, plot_overview
from lswt_core.ablation.report_text import PICTURE, render_markdown, render_terminal
from lswt_core.ablation.store import write_json
from lswt_core.plugin_api.atomic_write import write_atomically


def publish(study: Study, directory: Path) -> str:
    """Write the report; return what is printed on the terminal."""
    report = make_report(study)
    write_json(directory / "report.json", report)
    write_atomically(directory / "report.md", render_markdown(report).encode())
    picture = plot_overview(study, report)
    write_atomically(directory / PICTURE, picture)
    page = render_page(report, picture, plot_held_out(study))
    write_atomically(directory / "report.html", page.encode())
    return f"{render_terminal(report)}\n\nreport: {directory / 'report.html'}"
