"""The certificate of an arm from what its runs and the baseline's recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lswt_core.ablation.build_arms import BuiltArm
from lswt_core.ablation.certificate import (
    Flaw,
    RunRecord,
    SharedCounts,
    check_outcomes,
    check_records,
    is_allowed,
)
from lswt_core.ablation.runs.outcome import ArmResult, Outcome
from lswt_core.ablation.runs.run_records import read_run_record
from lswt_core.ablation.runs.store import RunStore
from lswt_core.errors import CheckpointError

# of an arm of which no pair of runs has records to compare
NOT_COMPARED = "not compared"


class RunsOfArms(NamedTuple):
    """Where the runs of an ablation are."""

    store: RunStore
    keys: Mapping[tuple[str, int], str]  # by arm and seed

    def record(self, outcome: Outcome, arm: str) -> RunRecord | None:
        """Return what a run recorded; None if it has not started. Raises CheckpointError if that is
        damaged.
        """
        return read_run_record(self.store.directory(self.keys[arm, outcome.seed]))


def certify(
    arm: BuiltArm, baseline: ArmResult, own: ArmResult, runs: RunsOfArms, allowed: Sequence[str]
) -> dict[str, Any]:
    """Return an arm's certificate as plain data: its axes, every flaw, and what its runs have in
    common with the baseline's.

    "status": "certified", "allowed" (flaws that were allowed by name), "broken" (others), or
    NOT_COMPARED.
    """
    shared, flaws = compare_runs(arm, baseline, own, runs)
    flaws = list(dict.fromkeys([*arm.flaws, *flaws]))
    same_groups = "groups" not in {flaw.about for flaw in flaws}
    return {
        "arm": arm.spec.name,
        "swaps": list(arm.spec.swaps),
        "axes": list(arm.axes),
        "status": find_status(flaws, shared, allowed),
        "changes": [change._asdict() for change in arm.changes],
        "flaws": [flaw._asdict() for flaw in flaws],
        "matched": None if arm.matched is None else arm.matched._asdict(),
        "parameter_groups": "as in the baseline" if same_groups else "different",
        "kernels": arm.structure.kernels,
        "runs": [{"seed": seed, **counts._asdict()} for seed, counts in shared.items()],
    }


def find_status(
    flaws: Sequence[Flaw], shared: Mapping[int, SharedCounts], allowed: Sequence[str]
) -> str:
    """Return the status of a certificate."""
    if any(not is_allowed(flaw, allowed) for flaw in flaws):
        return "broken"
    if not shared:
        return NOT_COMPARED
    return "allowed" if flaws else "certified"


def compare_runs(
    arm: BuiltArm, baseline: ArmResult, own: ArmResult, runs: RunsOfArms
) -> tuple[dict[int, SharedCounts], list[Flaw]]:
    """Return what an arm's runs have in common with the baseline's, by seed, and every flaw."""
    shared: dict[int, SharedCounts] = {}
    changed, flaws = [change.key for change in arm.changes], list[Flaw]()
    for before, after in zip(baseline.outcomes, own.outcomes, strict=True):
        try:
            records = runs.record(before, baseline.name), runs.record(after, own.name)
        except CheckpointError as error:
            flaws.append(Flaw("records", str(error).partition("\n")[0]))
            continue
        if records[0] is not None and records[1] is not None:
            shared[after.seed], more = check_records(records[0], records[1], arm.axes, changed)
            flaws += more
        if before.failure is after.failure is None:
            flaws += check_outcomes(before, after, changed)
        flaws += [Flaw(about, f"baseline: {text}") for about, text in before.flaws]
        flaws += [Flaw(about, text) for about, text in after.flaws]
    return shared, flaws
