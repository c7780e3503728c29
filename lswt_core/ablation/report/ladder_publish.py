"""Writes the report of a ladder: that of its largest rung, with a section about all of them, and
report-ladder.png.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from lswt_core.ablation.report.html_page import (
    render_origin,
    render_results,
    render_summary,
    render_tuning,
)
from lswt_core.ablation.report.ladder_plot import plot_ladder
from lswt_core.ablation.report.ladder_report import make_ladder_report
from lswt_core.ablation.report.ladder_text import (
    LADDER_PICTURE,
    render_ladder_html,
    render_ladder_markdown,
    render_ladder_terminal,
)
from lswt_core.ablation.report.plots import plot_held_out, plot_overview
from lswt_core.ablation.report.publish import draw
from lswt_core.ablation.report.text import (
    PICTURE,
    describe_picture,
    render_markdown,
    render_terminal,
)
from lswt_core.ablation.report.tuning_plot import plot_tuning
from lswt_core.ablation.report.tuning_text import TUNING_PICTURE
from lswt_core.ablation.run_ladder import LadderStudy
from lswt_core.ablation.runs.store import write_json
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.reporting.html import image, page


def publish_ladder(study: LadderStudy, directory: Path) -> str:
    """Write the report; return what is printed on the terminal. A picture that cannot be drawn
    costs the picture alone, and the report says so.
    """
    report = make_ladder_report(study)
    top = report["ladder"]["rungs"][-1]["report"]
    ladder = draw(report, LADDER_PICTURE, lambda: plot_ladder(report))
    overview = draw(report, PICTURE, lambda: plot_overview(study.top, top))
    held_out = draw(report, "held-out curves", lambda: plot_held_out(study.top))
    tuning = None
    if study.tuning is not None:
        tuning = draw(report, TUNING_PICTURE, lambda: plot_tuning(top))
    write_json(directory / "report.json", report)
    text = f"{render_ladder_markdown(report)}\n\n{render_markdown(top)}"
    write_atomically(directory / "report.md", text.encode())
    pictures = {LADDER_PICTURE: ladder, PICTURE: overview, TUNING_PICTURE: tuning}
    for name, picture in pictures.items():
        if picture is not None:
            write_atomically(directory / name, picture)
    sections = [
        *render_ladder_html(report, ladder),
        render_summary(top),
        image(overview or b"", describe_picture(top)),
        *render_results(top, held_out),
        *render_tuning(top, tuning),
        *render_origin(top),
    ]
    write_atomically(directory / "report.html", page(escape(report["name"]), sections).encode())
    printed = [render_terminal(top), render_ladder_terminal(report)]
    return "\n\n".join([*printed, f"report: {directory / 'report.html'}"])
