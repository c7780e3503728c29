"""report.html: the whole report of an ablation as one file that loads nothing else."""

from __future__ import annotations

from html import escape

from lswt_core.ablation.report.costs import list_noise
from lswt_core.ablation.report.facts import list_warnings
from lswt_core.ablation.report.tables import (
    Report,
    certificate_table,
    change_table,
    cost_table,
    loss_table,
    probe_table,
    seed_table,
)
from lswt_core.ablation.report.text import (
    describe_picture,
    list_document_intervals,
    list_failures,
    list_power,
    list_unknown,
    summarize,
)
from lswt_core.ablation.report.tuning_text import (
    describe_procedure,
    describe_tuning_picture,
    list_tuning_tables,
)
from lswt_core.reporting.html import bullet_list, code, image, nested_tables, page, section

HELD_OUT_ALT = "Held-out loss of every arm less the baseline's over the tokens trained on."


def render_page(
    report: Report, overview: bytes, held_out: bytes | None, tuning: bytes | None = None
) -> str:
    """Return the page, with the pictures (PNG) of ``plots``."""
    return page(
        escape(report["name"]),
        [
            render_summary(report),
            image(overview, describe_picture(report)),
            *render_results(report, held_out),
            *render_tuning(report, tuning),
            *render_origin(report),
        ],
    )


def render_summary(report: Report) -> str:
    """Return title and findings."""
    sentences = [f'<p class="verdict">{escape(one)}</p>' for one in summarize(report)]
    return f"<h1>{escape(report['name'])}</h1>{''.join(sentences)}"


def render_results(report: Report, held_out: bytes | None) -> list[str]:
    """Return the sections of results."""
    probes = probe_table(report)
    noise = list_noise(report["comparisons"])
    curves = "" if held_out is None else image(held_out, HELD_OUT_ALT)
    resolution = bullet_list(list_power(report) + list_document_intervals(report))
    return [
        section("Losses", loss_table(report).html()),
        section("What it costs", cost_table(report).html() + bullet_list(noise)),
        section("Every seed", seed_table(report).html()),
        section("Held-out loss over the run", curves),
        section("What these seeds could resolve", resolution),
        section("What could not be computed", bullet_list(list_unknown(report))),
        section("Failures", bullet_list(list_failures(report))),
        section("Probes", probes.html() if probes else ""),
    ]


def render_tuning(report: Report, picture: bytes | None) -> list[str]:
    """Return the sections about tuned values and other lengths of training."""
    sections = []
    for title, table in list_tuning_tables(report).items():
        sections.append(section(title, table.html()))
    if picture is not None:
        curves = image(picture, describe_tuning_picture(report))
        sections.insert(1, curves + bullet_list(describe_procedure(report)))
    return sections


def render_origin(report: Report) -> list[str]:
    """Return the sections of what was compared, and how."""
    settings = nested_tables({**report["settings"], **report["environment"]})
    citations = code("\n".join(report["citations"])) if report["citations"] else ""
    return [
        section("What the arms change", change_table(report).html()),
        section("Certificate", certificate_table(report).html()),
        section(
            "What no certificate shows", bullet_list(report["certificate_limits"]), folded=True
        ),
        section("Warnings of the runs", bullet_list(list_warnings(report["arms"]))),
        section("Settings and environment", settings, folded=True),
        section(
            "The baseline's recipe, every default written out", code(report["recipe"]), folded=True
        ),
        section("Made with", code(report["command"])),
        section("Citations", citations, folded=True),
    ]
