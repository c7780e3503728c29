"""Claims about components, each with the study that tests it: what a file of claims says, and what
is kept of a study's report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pydantic import Field, ValidationError, model_validator

from lswt_core.ablation.arms import BASELINE
from lswt_core.ablation.probe_runs import ProbedRuns, Run
from lswt_core.ablation.report.probes import compare_probes
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.errors import Problem, RecipeError, UsageError
from lswt_core.evaluation.probes import Values
from lswt_core.recipe.loader import File, find, read
from lswt_core.recipe.provenance import Origin
from lswt_core.recipe.schema import Table

Report = dict[str, Any]
LOSS = "loss"
KEPT = ("name", "command", "environment")  # of a ladder's report, beside its rungs
# of every part of a report: what says how it was made, run by run
DROPPED = {
    *("recipe", "citations", "components", "by_component", "changes", "runs", "code", "curve"),
    *("certificate_limits", "fixed", "tuned", "lower", "spread", "procedure"),
    *("where", "owner"),
}


class ClaimTable(Table):
    """[claim.NAME] of a file of claims."""

    says: str  # the claim, in a sentence
    ablate: str = ""  # the words of the ``ablate`` command that tests it; "": nothing does yet
    study: str | None = None  # the directory of its report; None: the claim's name
    arm: str | None = None  # that the claim is about; None: the study has one
    # The arm has something else in place of what the claim is about: where the arm is worse, the
    # claim is supported.
    replaces: bool = True
    measure: str = LOSS  # what the claim is judged by: held-out loss, or a probe
    higher_is_better: bool = False  # of the measure
    # The first seed that judges; those before it had been seen when the measure was chosen.
    seeds_from: int = Field(0, ge=0)
    probe: list[str] = Field(default_factory=list)  # of the trained models (``ablate --probe``)
    note: str = ""  # what the study cannot show
    more: list[str] = Field(default_factory=list)  # commands that would show more

    @model_validator(mode="after")
    def require_direction(self) -> ClaimTable:
        """Raise ValueError if the held-out loss is said to be better where it is higher."""
        if self.higher_is_better and self.measure == LOSS:
            raise ValueError("a lower loss is better: higher_is_better is for a probe")
        return self


class ClaimsFile(Table):
    """The schema of a file of claims."""

    title: str
    source: str  # whose claims they are
    claim: Mapping[str, ClaimTable]


class TestedClaim(NamedTuple):
    """A claim and its study's report; None: there is none."""

    name: str
    claim: ClaimTable
    report: Report | None


def read_claims(path: Path) -> ClaimsFile:
    """Read and validate a file of claims; raises RecipeError."""
    file = read(find(path), str(path), Origin(str(path), ""))
    try:
        return ClaimsFile.model_validate(file.tables)
    except ValidationError as error:
        problems = [
            describe_problem(file, one["loc"], one["msg"].removeprefix("Value error, "))
            for one in error.errors()
        ]
        raise RecipeError(problems) from error


def describe_problem(file: File, place: Sequence[Any], why: str) -> Problem:
    """Return the problem of an invalid key of a file of claims."""
    origin = file.locate(tuple(map(str, place)))
    model = ClaimTable if place[0] == "claim" else ClaimsFile
    what = f'cannot use "{".".join(map(str, place))}"'
    fix = f"a claim has the keys {', '.join(ClaimTable.model_fields)}"
    if model is ClaimsFile:
        fix = f"a file of claims has the keys {', '.join(ClaimsFile.model_fields)}"
    return Problem(what, origin.where, why, fix, origin.text)


def read_report(path: Path) -> Report | None:
    """Return a report; None if there is no such file. Raises UsageError if it is not one of a
    finished study.
    """
    if not path.is_file():
        return None
    report: Report = json.loads(path.read_text(encoding="utf-8"))
    if "ladder" in report:  # the rest is that of the largest rung
        report = report["ladder"]["rungs"][-1]["report"] | report
    if report.get("unfinished"):
        raise UsageError(
            f"{path}: this study is not finished\n  fix: make it to its end: {report['command']}"
        )
    return report


def probe_report(report: Report, names: Sequence[str], probed: ProbedRuns) -> None:
    """Measure probes of the models of a report's runs, where all of these still are, and put them
    in; those that ``ablate --probe`` measured are there already.
    """
    for rung in rungs_of(report):
        arms, settings = rung["report"]["arms"], rung["report"]["settings"]
        places = [run["directory"] for arm in arms for run in arm["runs"]]
        if not all(place and Path(place).is_dir() for place in places):
            continue
        values = probed.values_of(finished_runs(arms))
        baseline, *others = [
            {seed: found for (name, seed), found in values.items() if name == arm["name"]}
            for arm in arms
        ]
        for arm, own in zip(arms, (baseline, *others), strict=True):
            arm["probes"] |= mean_values(list(own.values()))
        for comparison, own in zip(rung["report"]["comparisons"], others, strict=True):
            pairs = [
                (Outcome(seed, probes=baseline[seed]), Outcome(seed, probes=own[seed]))
                for seed in own
                if seed in baseline
            ]
            if pairs:
                comparison["probes"] |= compare_probes(pairs, settings["confidence"])


def finished_runs(arms: Sequence[Report]) -> dict[Run, Path]:
    """Return the directories of the finished runs of a report's arms."""
    return {
        (arm["name"], run["seed"]): Path(run["directory"])
        for arm in arms
        for run in arm["runs"]
        if run["seed"] not in {one["seed"] for one in arm["failures"]}
    }


def mean_values(runs: Sequence[Values]) -> Values:
    """Return the means of the values that runs have."""
    return {
        name: fmean(run[name] for run in runs if name in run)
        for name in dict.fromkeys(name for run in runs for name in run)
    }


def rungs_of(report: Report) -> list[Report]:
    """Return the rungs of a ladder's report; that of one size is a rung of its own."""
    if "ladder" in report:
        rungs: list[Report] = report["ladder"]["rungs"]
        return rungs
    return [{"name": "", "report": report}]


def keep(report: Report, arm: str | None) -> Report:
    """Return what the page of claims needs of a report: it stays a report, of one arm (None: the
    only one), without its runs. Raises UsageError if it does not have that arm.
    """
    arms = [one["arm"] for one in rungs_of(report)[-1]["report"]["comparisons"]]
    if arm not in arms and not (arm is None and len(arms) == 1):
        raise UsageError(
            f"the study {report['name']!r} has the arms {', '.join(arms)}\n  fix: name one of them:"
            " arm = ..."
        )
    if "ladder" in report:  # ``read_report`` takes the rest from the largest rung
        report = {key: report[key] for key in (*KEPT, "ladder")}
    kept: Report = of_arms(without(report), {BASELINE, arm or arms[0]})
    return kept


def of_arms(data: Any, names: set[str]) -> Any:
    """Return plain data in which lists of arms, or of entries about arms, have those of ``names``
    alone.
    """
    if isinstance(data, list):
        return [of_arms(one, names) for one in data if arm_of(one) in (None, *names)]
    if not isinstance(data, dict):
        return data
    return {key: of_arms(one, names) for key, one in data.items()}


def arm_of(entry: Any) -> str | None:
    """Return which arm an entry of a report is about; None: it is about none."""
    if not isinstance(entry, dict):
        return None
    name = entry.get("arm", entry.get("name") if "final_loss" in entry else None)
    return name if isinstance(name, str) else None


def without(data: Any) -> Any:
    """Return plain data without what is in DROPPED, at any depth."""
    if isinstance(data, list):
        return [without(one) for one in data]
    if not isinstance(data, dict):
        return data
    return {key: without(one) for key, one in data.items() if key not in DROPPED}
