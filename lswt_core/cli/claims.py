"""``python -m lswt_core claims FILE``: what studies say of claims, as one page."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lswt_core.cli.common import next_commands, plugin_argument, required_registry

if TYPE_CHECKING:
    from lswt_core.ablation.claims import ClaimTable, Report
    from lswt_core.ablation.probe_runs import ProbedRuns


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("file", type=Path, help="a TOML file of claims, e.g. .github/claims.toml")
    parser.add_argument(
        "--reports",
        type=Path,
        metavar="DIR",
        help=(
            "where finished studies' reports are, each in a directory named like its study;"
            " what the page needs of them is kept beside it, and is read where there is none"
        ),
    )
    plugin_argument(parser)


def claims(arguments: argparse.Namespace) -> int:
    """Write FILE.md, and what it is made of in a directory FILE/."""
    from lswt_core.ablation.claims import TestedClaim, keep, read_claims, read_report
    from lswt_core.ablation.probe_runs import ProbedRuns, require_probes
    from lswt_core.ablation.report.claims_page import render_claims
    from lswt_core.ablation.runs.store import write_json
    from lswt_core.plugin_api.atomic_write import write_atomically

    file, folder = read_claims(arguments.file), arguments.file.with_suffix("")
    registry, tested = required_registry(arguments), []
    for name, claim in file.claim.items():
        require_probes(claim.probe)
        probed = ProbedRuns(claim.probe, registry, lambda line: print(line, flush=True))
        fresh = fresh_report(arguments.reports, name, claim, probed)
        if fresh is not None:
            folder.mkdir(exist_ok=True)
            write_json(folder / f"{name}.json", keep(fresh, claim.arm))
        tested.append(TestedClaim(name, claim, read_report(folder / f"{name}.json")))
    page = arguments.file.with_suffix(".md")
    again = f"python -m lswt_core claims {shlex.quote(str(arguments.file))}"
    write_atomically(page, render_claims(file, tested, again).encode())
    print(f"page: {page}")
    missing = [one.claim.ablate for one in tested if one.report is None and one.claim.ablate]
    if missing:
        print(next_commands(*(f"lswt_core ablate {words}" for words in missing)))
    return 0


def fresh_report(
    reports: Path | None, name: str, claim: ClaimTable, probed: ProbedRuns
) -> Report | None:
    """The report of a claim's study with its probes; None if there is none in ``reports``."""
    from lswt_core.ablation.claims import probe_report, read_report
    from lswt_core.ablation.report.comparison_report import headline_report

    report = (
        None if reports is None else read_report(reports / (claim.study or name) / "report.json")
    )
    if report is None:
        return None
    if "ladder" not in report:  # of a ladder, every rung's report is that of its headline
        report = headline_report(report)
    if claim.probe:
        probe_report(report, claim.probe, probed)
    return report
