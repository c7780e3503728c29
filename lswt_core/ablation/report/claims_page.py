"""The page of claims: each with its study, what it found, and what would show more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lswt_core.ablation.claims import LOSS, ClaimsFile, ClaimTable, Report, TestedClaim, rungs_of
from lswt_core.ablation.report.findings import list_findings
from lswt_core.ablation.report.ladder_text import format_cell, format_span, ladder_table
from lswt_core.ablation.report.loss_tables import format_difference, loss_table
from lswt_core.ablation.report.probes import probe_table
from lswt_core.ablation.report.verdict import (
    BETTER,
    EQUIVALENT,
    SMALL,
    SMALL_BETTER,
    SMALL_WORSE,
    WORSE,
)
from lswt_core.ablation.statistics.paired_runs import paired_test
from lswt_core.errors import UsageError
from lswt_core.reporting.sections import Bullets, Code, Part, Section, Sentences, render_markdown
from lswt_core.reporting.tables import Table

SUPPORTED, CONTRADICTED = "supported", "contradicted"
NO_DIFFERENCE, UNRESOLVED, UNTESTED = "no difference", "not resolved", "not tested"
HIGHER = "higher is better"
FEWEST = 2  # pairs of runs that have an interval
OVERVIEW = (
    *("claim", "arm", "judged by", "difference", "95 % interval"),
    *("worth of compute", "seeds", "finding"),
)
TEXT_COLUMNS = (0, 1, 2, 7)
FINDINGS = (
    f'A finding is about the largest size: "{SUPPORTED}" and "{CONTRADICTED}" where the difference'
    " is resolved (for losses by the verdict; for other measures: its 95 % interval, of that"
    f' measure alone, leaves out 0), "{NO_DIFFERENCE}" where it is shown to be within the margin.'
    " Nothing is said about larger models. Where a measure was chosen after some seeds had been"
    " seen, the others judge alone."
)
CORRECTED = (
    "The intervals of every table are of one difference alone. Verdicts are corrected for all arms"
    " and looks of a study (Holm), so that a difference whose interval leaves out 0 may still be"
    f' "{UNRESOLVED}".'
)


def render_claims(file: ClaimsFile, tested: Sequence[TestedClaim], command: str) -> str:
    """Return the page in Markdown; ``command`` makes it again."""
    arms = [overview_row(one) for one in tested]
    intro = [
        f"Claims of {file.source}, each as an ablation: an arm has something else in place of what"
        " the claim is about, and differences are arm minus baseline; less is better, but where"
        f' it says "{HIGHER}".',
        FINDINGS,
        CORRECTED,
    ]
    sections = [
        Section("", [Sentences(intro), Code(command, "bash")]),
        Section("All claims", [Table(OVERVIEW, arms, text_columns=TEXT_COLUMNS)]),
        *(claim_section(one) for one in tested),
    ]
    return render_markdown(file.title, sections)


def overview_row(one: TestedClaim) -> list[str]:
    """Return a claim's row of the table of all claims."""
    claim, report = one.claim, one.report
    if report is None:
        return [claim.says, "", "", "", "", "", "", UNTESTED]
    size, comparison = top_of(report)
    judged = judge(one)
    measure = claim.measure.replace("_", " ")
    if claim.higher_is_better:
        measure = f"{measure} ({HIGHER})"
    return [
        claim.says,
        comparison["arm"],
        f"{measure} at {size}" if size else measure,
        "" if judged.delta is None else format_difference(judged.delta),
        format_span(judged.interval, format_difference),
        worth_of(report),
        judged.seeds,
        conclude(claim, comparison, judged),
    ]


def top_of(report: Report) -> tuple[str, dict[str, Any]]:
    """Return the largest size and its comparison of the arm with the baseline."""
    top = rungs_of(report)[-1]
    comparison: dict[str, Any] = top["report"]["comparisons"][0]
    return top["name"], comparison


class Judged(NamedTuple):
    """The difference that a claim is judged by; None: not measured."""

    delta: float | None
    interval: Sequence[float] | None
    seeds: str  # how many; which, if not all


def judge(one: TestedClaim) -> Judged:
    """Return what a claim is judged by. Raises UsageError if its seeds cannot be told apart."""
    claim, report = one.claim, one.report
    assert report is not None
    comparison = top_of(report)[1]
    found = comparison if claim.measure == LOSS else comparison["probes"].get(claim.measure)
    seeds, first = comparison["seeds"], claim.seeds_from
    if found is None:
        return Judged(None, None, str(seeds))
    if first == 0:
        return Judged(found["delta"], found["ci95"], str(seeds))
    if comparison["lost"] or len(found["values"]) - first < FEWEST:
        raise UsageError(
            f"[claim.{one.name}] seeds_from = {first}: its study has {len(found['values'])} pairs"
            f" of runs, {comparison['lost']} lost\n  fix: make a study of {first + FEWEST} seeds or"
            " more without losing one"
        )
    test = paired_test(found["values"][first:], 0.95)
    return Judged(test.delta, test.ci, f"{seeds - first} ({first} to {seeds - 1})")


def worth_of(report: Report) -> str:
    """Return what the arm is worth in compute at the largest size, if that was asked and known."""
    if "ladder" not in report:
        return ""
    speedup = report["ladder"]["arms"][0]["speedup"]
    worth = speedup and speedup["by_rung"][-1]
    return format_cell(worth) if worth and worth["ci95"] else ""


def conclude(claim: ClaimTable, comparison: dict[str, Any], judged: Judged) -> str:
    """Return what a study says of a claim."""
    verdict, remark = comparison["verdict"], ""
    if claim.measure == LOSS and claim.seeds_from == 0:
        if verdict == EQUIVALENT:
            return NO_DIFFERENCE
        sign = {WORSE: 1, SMALL_WORSE: 1, BETTER: -1, SMALL_BETTER: -1}.get(verdict, 0)
        if verdict in SMALL:
            remark = ", maybe by less than the margin"
    else:
        sign = sign_of(judged.interval) * (-1 if claim.higher_is_better else 1)
    if sign == 0:
        return UNRESOLVED
    return (SUPPORTED if (sign > 0) == claim.replaces else CONTRADICTED) + remark


def sign_of(interval: Sequence[float] | None) -> int:
    """Return the sign of all of an interval; 0 if it has both, or there is none."""
    if interval is None:
        return 0
    low, high = interval
    return (low > 0) - (high < 0)


def claim_section(one: TestedClaim) -> Section:
    """Return a claim's section."""
    claim, report = one.claim, one.report
    parts: list[Part | None] = [Sentences([claim.says])]
    if report is not None:
        table = ladder_table(report) if "ladder" in report else loss_table(report)
        parts += [Code(report["command"], "bash"), table]
        for rung in rungs_of(report):
            parts += [
                Sentences([f"Probes, {rung['name'] or 'one size'}:"]),
                probe_table(rung["report"]),
            ]
        parts.append(Bullets([*list_findings(report), *filter(None, [claim.note])]))
    else:
        parts.append(Bullets(["Not tested.", *filter(None, [claim.note])]))
    if claim.more:
        parts += [Sentences(["To say more:"]), Code("\n".join(claim.more), "bash")]
    return Section(one.name.replace("-", " "), parts)
