"""Probes of the trained models of a study, measured when its runs are done and kept beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from lswt_core.ablation.runs.outcome import ArmResult, Outcome
from lswt_core.ablation.runs.store import write_json
from lswt_core.decode.load_run import load_run
from lswt_core.errors import UsageError
from lswt_core.evaluation.probes import PROBES, Values
from lswt_core.evaluation.texts import held_out_text, limits_for
from lswt_core.model.code_fingerprint import describe_core
from lswt_core.registry import Registry

FILE = "probes.json"  # of a run: what was measured, and the hash of the code that did, by probe
TOKENS = 32_768  # of the held-out text that are read

Run = tuple[str, int]  # an arm's name and a seed


def require_probes(names: Sequence[str]) -> None:
    """Raise UsageError for a probe that there is not."""
    for name in names:
        if name not in PROBES:
            raise UsageError(f"--probe {name}: there is no such probe\n  fix: {', '.join(PROBES)}")


class ProbedRuns:
    """Probes of stored runs."""

    def __init__(
        self, names: Sequence[str], registry: Registry, say: Callable[[str], None]
    ) -> None:
        self.names, self.registry, self.say = names, registry, say

    def add(self, arms: Sequence[ArmResult]) -> list[ArmResult]:
        """Return arms whose finished runs have the probes."""
        values = self.values_of(
            {
                (arm.name, one.seed): Path(arm.stored[one.seed][1])
                for arm in arms
                for one in arm.finished_runs()
            }
        )

        def with_probes(arm: ArmResult, one: Outcome) -> Outcome:
            """A run's outcome with its probes."""
            return replace(one, probes=one.probes | values.get((arm.name, one.seed), {}))

        return [
            replace(arm, outcomes=[with_probes(arm, one) for one in arm.outcomes]) for arm in arms
        ]

    def values_of(self, runs: Mapping[Run, Path]) -> dict[Run, Values]:
        """Return the probes of runs, given with their directories; runs of one seed are compared.
        What was measured before is read.
        """
        measured = {
            run: self.measured_of(directory, f"{run[0]}, seed {run[1]}")
            for run, directory in runs.items()
        }
        values: dict[Run, Values] = {run: {} for run in runs}
        for name in self.names:
            for seed in dict.fromkeys(seed for _, seed in runs):
                group = [run for run in runs if run[1] == seed and measured[run][name]]
                if not group:
                    continue
                for run, found in zip(group, self.compare(name, measured, group), strict=True):
                    values[run] |= found
        return values

    def compare(
        self, name: str, measured: Mapping[Run, dict[str, Any]], group: Sequence[Run]
    ) -> list[Values]:
        """Return a probe's values of a group of runs; of none of them if they cannot be compared,
        and then it is said why.
        """
        try:
            return PROBES[name].compare([measured[run][name] for run in group])
        except UsageError as error:
            self.say(f"left out: {name} of seed {group[0][1]}: {error}")
            return [{} for _ in group]

    def measured_of(self, directory: Path, what: str) -> dict[str, dict[str, Any]]:
        """Return what every probe measured of a run, {} where it does not have it; ``what`` names
        the run.
        """
        found = {name: read_probe(directory, name) for name in self.names}
        missing = [name for name, known in found.items() if known is None]
        if missing:
            self.say(f"{what}: probing {', '.join(missing)}")
            found |= self.measure(directory, missing)
        return {name: known or {} for name, known in found.items()}

    def measure(self, directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Measure probes of a run's last checkpoint on its held-out text, and keep them."""
        run = load_run(directory, self.registry)
        text = cache(
            lambda: held_out_text(run, self.registry, limits_for(TOKENS, run.model.seq_len))
        )
        measured: dict[str, dict[str, Any]] = {}
        for name in names:
            try:
                measured[name] = PROBES[name].measure(run.model, text())
            except UsageError as error:  # the model or the text does not have it
                measured[name] = {}
                self.say(f"left out: {name}: {str(error).partition(chr(10))[0]}")
            keep_probe(directory, name, measured[name])
        return measured


def read_probe(directory: Path, name: str) -> dict[str, Any] | None:
    """Return what a probe measured of a run; None if it did not, or by other code."""
    path = directory / FILE
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8")).get(name)
    if kept is None or kept["core"] != core_hash():
        return None
    measured: dict[str, Any] = kept["measured"]
    return measured


def keep_probe(directory: Path, name: str, measured: dict[str, Any]) -> None:
    """Keep what a probe measured of a run beside its others."""
    path, kept = directory / FILE, dict[str, Any]()
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, kept | {name: {"core": core_hash(), "measured": measured}})


@cache
def core_hash() -> str | None:
    """Return the hash of the code that measures."""
    return describe_core()["sha256"]
