"""The looks of one study: declared before its runs, recorded before its verdicts."""

from __future__ import annotations

from collections.abc import Sequence

from lswt_core.ablation.runs.comparison_records import Comparison, ComparisonRecords
from lswt_core.ablation.runs.outcome import ArmResult, Looks, OtherComparison
from lswt_core.ablation.runs.progress import Job
from lswt_core.ablation.runs.store import RunStore


class StudyLooks:
    """The looks at every arm of a study."""

    def __init__(
        self, comparisons: Sequence[Comparison], store: RunStore, planned: Sequence[int]
    ) -> None:
        self.comparisons, self.store, self.planned = comparisons, store, planned
        self.records = ComparisonRecords(store.root)

    def declare(self, jobs: Sequence[Job]) -> None:
        """Declare the planned looks; those that were declared before stand. A record that cannot
        be read is an error here, before anything is trained.
        """
        finished = {(job.arm, job.seed) for job in jobs if self.store.read(job.key) is not None}
        baseline = jobs[0].arm
        for one in self.comparisons:
            own = [seed for arm, seed in finished if arm == one.name]
            pairs = sum((baseline, seed) in finished for seed in own)
            self.records.declare(one, self.planned, is_seen=pairs > 1)
        self.others()

    def take(self, arms: Sequence[ArmResult]) -> None:
        """Record that the arms (the baseline first) are looked at."""
        baseline, *others = arms
        for one, arm in zip(self.comparisons, others, strict=True):
            self.records.take_look(one, len(arm.outcomes), arm.differences(baseline))

    def by_arm(self) -> dict[str, Looks]:
        """Return the looks at every arm."""
        return {one.name: self.records.looks(one) for one in self.comparisons}

    def others(self) -> list[OtherComparison]:
        """Return the other comparisons with this baseline."""
        return self.records.others(self.comparisons)
