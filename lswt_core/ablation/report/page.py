"""The report of an ablation as one list of sections: a page that is understood in two minutes, with
its details folded; the same as Markdown; and what the terminal prints of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lswt_core.ablation.report.cost_tables import cost_table, spread_table
from lswt_core.ablation.report.costs import list_caveats
from lswt_core.ablation.report.curve_data import CURVES
from lswt_core.ablation.report.findings import describe_picture, list_findings, list_verdicts
from lswt_core.ablation.report.ladder_details import list_details
from lswt_core.ablation.report.ladder_text import (
    LADDER_PICTURE,
    describe_ladder_picture,
    ladder_table,
)
from lswt_core.ablation.report.limits import list_limits
from lswt_core.ablation.report.loss_tables import (
    Report,
    list_selected,
    loss_table,
    seed_table,
    significance_table,
)
from lswt_core.ablation.report.origin import list_origins
from lswt_core.ablation.report.power import list_power
from lswt_core.ablation.report.probes import NOTE, probe_table
from lswt_core.ablation.report.swap_tables import certificate_table, change_table
from lswt_core.ablation.report.tuning_text import (
    TUNING_PICTURE,
    describe_procedure,
    describe_tuning_picture,
    fixed_table,
    horizon_table,
    tuning_table,
)
from lswt_core.reporting import sections
from lswt_core.reporting.sections import Bullets, Part, Picture, Section, Sentences

PICTURE, CURVES_PICTURE = "report.png", "report-curves.png"
HELD_OUT_PICTURE = "report-held-out.png"
CURVES_ALT = "Training curves of all arms, and held-out loss by preceding tokens of the document."
HELD_OUT_ALT = "Held-out loss of every arm less the baseline's over the tokens trained on."
BANDS = (
    "Lines are means over seeds; bands reach from the lowest to the highest seed and are no"
    " confidence intervals."
)


def render_terminal(report: Report) -> str:
    """Return what the command prints at its end."""
    return sections.render_text(list_sections(report))


def render_markdown(report: Report, pictures: Collection[str] = ()) -> str:
    """Return report.md, with ``pictures`` that lie beside it."""
    return sections.render_markdown(report["name"], list_sections(report, pictures))


def render_page(report: Report, pictures: Mapping[str, bytes]) -> str:
    """Return report.html, with pictures (PNG) by file name."""
    return sections.render_page(report["name"], list_sections(report, pictures), pictures)


def list_sections(report: Report, pictures: Collection[str] = ()) -> list[Section]:
    """Return the whole report."""
    return [
        *list_results(report, pictures),
        *list_measurements(report),
        *list_tuning(report, pictures),
        *list_curves(report, pictures),
        *list_swaps(report),
        *list_origins(report),
    ]


def list_results(report: Report, pictures: Collection[str]) -> list[Section]:
    """Return what everybody should read."""
    losses: list[Part | None] = [loss_table(report), Bullets(list_selected(report))]
    tables = [Section("Losses", losses, printed=True)]
    picture = show(PICTURE, describe_picture(report), pictures, narrow=True)
    if "ladder" in report:
        top, losses = report["ladder"]["rungs"][-1]["name"], [picture, *losses]
        picture = show(LADDER_PICTURE, describe_ladder_picture(report), pictures)
        tables = [
            Section("Does it hold as models grow?", [ladder_table(report)], printed=True),
            Section(f"At {top}", [Bullets(list_verdicts(report)), *losses], printed=True),
        ]
    return [
        Section("", [Sentences(list_findings(report)), picture], printed=True),
        *tables,
        Section("What this cannot tell", [Bullets(list_limits(report))], printed=True),
        Section("What could not be computed", [Bullets(list_unknown(report))], printed=True),
        Section("Failures", [Bullets(list_failures(report))], printed=True),
    ]


def list_measurements(report: Report) -> list[Section]:
    """Return costs, every seed and power."""
    device = str(report["environment"].get("device", ""))
    caveats = Bullets(list_caveats(report["comparisons"], device))
    power: list[Part | None] = [significance_table(report), Bullets(list_power(report))]
    return [
        Section("What it costs", [cost_table(report), caveats], folded=True, printed=True),
        Section("Costs in detail", [spread_table(report)], folded=True),
        Section("Every seed", [seed_table(report)], folded=True),
        Section("What these seeds could resolve", power, folded=True),
    ]


def list_tuning(report: Report, pictures: Collection[str]) -> list[Section]:
    """Return the sections about tuned values, lengths of training and sizes."""
    found: list[Section] = []
    if report.get("tuning") is not None:
        picture = show(TUNING_PICTURE, describe_tuning_picture(report), pictures)
        procedure = Bullets(describe_procedure(report))
        found.append(Section("Tuning", [tuning_table(report), picture, procedure], folded=True))
        fixed = [fixed_table(report)]
        found.append(Section("At the recipe's values (untuned)", fixed, folded=True))
    if report.get("horizons") is not None:
        lengths = [horizon_table(report)]
        found.append(Section("At other lengths of training", lengths, folded=True))
    if "ladder" in report:
        details = [Bullets(list_details(report))]
        found.append(Section("Trend, law, next size and back-test", details, folded=True))
    return found


def list_curves(report: Report, pictures: Collection[str]) -> list[Section]:
    """Return the pictures of curves, and where they are as data."""
    drawn = [
        show(CURVES_PICTURE, CURVES_ALT, pictures),
        show(HELD_OUT_PICTURE, HELD_OUT_ALT, pictures),
    ]
    lines = [
        f"{CURVES} has the training curve, held-out losses and loss by position of every run.",
    ]
    if any(drawn):
        lines.insert(0, BANDS)
    return [Section("Curves", [*drawn, Bullets(lines)], folded=True)]


def list_swaps(report: Report) -> list[Section]:
    """Return what the arms are: probes, changes and certificates."""
    limits = Bullets(report["certificate_limits"])
    certificate: list[Part | None] = [certificate_table(report), limits]
    return [
        Section("Probes", list_probes(report), folded=True),
        Section("What the arms change", [change_table(report)], folded=True),
        Section("Certificate, and what none shows", certificate, folded=True),
    ]


def list_probes(report: Report) -> list[Part | None]:
    """Return the table of probes and its note, if there are any."""
    table = probe_table(report)
    return [] if table is None else [table, Bullets([NOTE])]


def show(file: str, alt: str, pictures: Collection[str], *, narrow: bool = False) -> Picture | None:
    """Return a picture; None if it was not drawn."""
    return Picture(file, alt, narrow) if file in pictures else None


def list_unknown(report: Report) -> list[str]:
    """Return every number that could not be computed, and why."""
    entries = [(arm["name"], arm["unknown"]) for arm in report["arms"]]
    entries += [(one["arm"], one["unknown"]) for one in report["comparisons"]]
    lines = []
    for name, unknown in entries:
        lines += [f"{name}: {key} is unknown: {why}" for key, why in unknown.items()]
    return lines


def list_failures(report: Report) -> list[str]:
    """Return every run that failed, and why."""
    lines = []
    for arm in report["arms"]:
        lines += [f"{arm['name']}, seed {one['seed']}: {one['why']}" for one in arm["failures"]]
    return lines
