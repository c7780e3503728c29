"""report.html: the whole report as one file that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from lswt_core.ablation import tables as words
from lswt_core.reporting.html import image, nested, page, section, table


def html(report: dict[str, Any], overview: bytes, held_out: bytes | None) -> str:
    """The page."""
    name, (seeds, rows), (probes, looked) = (
        escape(report["name"]),
        words.seed_rows(report),
        words.probe_rows(report),
    )
    tested = (
        ""
        if held_out is None
        else image(held_out, "held-out loss less the baseline's over the run")
    )
    return page(
        name,
        [
            f"<h1>{name}</h1>"
            + "".join(
                f'<p class="verdict">{escape(sentence)}</p>' for sentence in words.summary(report)
            ),
            image(overview, "differences with intervals, training curves, loss by position"),
            section("Losses", table(words.loss_rows(report), words.LOSSES)),
            section("What it costs", table(words.cost_rows(report), words.COSTS)),
            section("Every seed", table(rows, seeds)),
            section("Held-out loss over the run", tested),
            section(
                "What these seeds could resolve",
                listed(words.power_lines(report) + documents(report)),
            ),
            section("What could not be computed", listed(words.unknown_lines(report))),
            section("Failures", listed(words.failure_lines(report))),
            section("Probes", table(looked, probes) if looked else ""),
            section("What the arms change", table(words.change_rows(report), words.CHANGES)),
            section("Certificate", table(words.certificate_rows(report), words.CERTIFICATE)),
            section(
                "Settings and environment",
                plain({**report["settings"], **report["environment"]}),
                folded=True,
            ),
            section(
                "The baseline's recipe, every default written out",
                code(report["recipe"]),
                folded=True,
            ),
            section("Made with", code(report["command"])),
            section(
                "Citations",
                code("\n".join(report["citations"])) if report["citations"] else "",
                folded=True,
            ),
        ],
    )


def documents(report: dict[str, Any]) -> list[str]:
    """The uncertainty that the choice of held-out text adds."""
    found = []
    for one in report["comparisons"]:
        if one["documents_ci95"] is not None:
            low, high = map(words.signed, one["documents_ci95"])
            found.append(
                f"{one['arm']}: over other held-out documents of this kind, for these very models,"
                f" {low} to {high} (95 % interval)."
            )
    return found


def listed(lines: Sequence[str]) -> str:
    """A list; nothing where there are no lines."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def code(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{escape(text)}</pre>"


def plain(values: Any) -> str:
    """Nested values as tables."""
    return f'<div class="plain">{nested(values)}</div>'
