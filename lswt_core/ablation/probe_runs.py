"""Probes of the trained models of a study, measured when its runs are done and kept beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from lswt_core.ablation.runs.outcome import ArmResult, Outcome
from lswt_core.ablation.runs.store import write_json
from lswt_core.decode.load_run import load_run
from lswt_core.errors import UsageError
from lswt_core.evaluation.probes import PROBES
from lswt_core.evaluation.texts import SEGMENTS, Limits, held_out_text
from lswt_core.model.code_fingerprint import describe_core
from lswt_core.registry import Registry

FILE = "probes.json"  # of a run's directory: what measured it, and its values, by probe
TOKENS = 32_768  # of the held-out text that are read


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

    def add(self, arm: ArmResult) -> ArmResult:
        """Return an arm whose finished runs have the probes."""
        return replace(arm, outcomes=[self.probe(arm, one) for one in arm.outcomes])

    def probe(self, arm: ArmResult, outcome: Outcome) -> Outcome:
        """Return a run's outcome with its probes."""
        if outcome.failure is not None:
            return outcome
        directory, what = Path(arm.stored[outcome.seed][1]), f"{arm.name}, seed {outcome.seed}"
        return replace(outcome, probes=outcome.probes | self.values_of(directory, what))

    def values_of(self, directory: Path, what: str) -> dict[str, float]:
        """Return the probes of a run; those that were measured before are read. ``what`` names the
        run.
        """
        values, missing = dict[str, float](), []
        for name in self.names:
            known = read_probe(directory, name)
            if known is None:
                missing.append(name)
            else:
                values |= known
        if missing:
            self.say(f"{what}: probing {', '.join(missing)}")
            values |= self.measure(directory, missing)
        return values

    def measure(self, directory: Path, names: Sequence[str]) -> dict[str, float]:
        """Measure probes of a run's last checkpoint on its held-out text, and keep them."""
        run = load_run(directory, self.registry)
        text = held_out_text(run, self.registry, Limits(TOKENS, SEGMENTS * run.model.seq_len))
        values: dict[str, float] = {}
        for name in names:
            try:
                found = PROBES[name](run.model, text)
            except UsageError as error:  # the model or the text does not have it
                found = {}
                self.say(f"left out: {name}: {str(error).partition(chr(10))[0]}")
            keep_probe(directory, name, found)
            values |= found
        return values


def read_probe(directory: Path, name: str) -> dict[str, float] | None:
    """Return a run's probe; None if it was not measured, or by other code."""
    path = directory / FILE
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8")).get(name)
    if kept is None or kept["core"] != core_hash():
        return None
    values: dict[str, float] = kept["values"]
    return values


def keep_probe(directory: Path, name: str, values: dict[str, float]) -> None:
    """Keep a run's probe beside its others."""
    path, kept = directory / FILE, dict[str, Any]()
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, kept | {name: {"core": core_hash(), "values": values}})


@cache
def core_hash() -> str | None:
    """Return the hash of the code that measures."""
    return describe_core()["sha256"]
