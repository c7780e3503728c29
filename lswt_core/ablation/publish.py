"""Writes a study's report: report.json, report.md, report.html and report.png, each whole or not at
all.
"""

from __future__ import annotations

from pathlib import Path

from lswt_core.ablation.compare import report as reported
from lswt_core.ablation.html_page import html
from lswt_core.ablation.outcome import Study
from lswt_core.ablation.plots import held_out, overview
from lswt_core.ablation.store import write_bytes, write_json
from lswt_core.ablation.tables import PICTURE, markdown, terminal


def publish(study: Study, directory: Path) -> str:
    """Write the report; returns what is to be printed."""
    found = reported(study)
    write_json(directory / "report.json", found)
    write_bytes(directory / "report.md", markdown(found).encode())
    picture = overview(study, found)
    write_bytes(directory / PICTURE, picture)
    write_bytes(directory / "report.html", html(found, picture, held_out(study)).encode())
    return f"{terminal(found)}\n\nreport: {directory / 'report.html'}"
