"""The record of comparisons: beside the runs of a store, the looks at every arm that was compared
with a baseline. So another report directory, or another command, forgets neither that data were
looked at nor how many arms were.

    STORE/comparisons/BASELINE/COMPARISON/declared.json    the looks declared before the first
                                          look-SEEDS-PAIRS.json   the differences of a look

One small file for each look, written atomically, and a directory that appears whole: studies that
run at once lose nothing of each other's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

from lswt_core.ablation.runs.outcome import Looks, OtherComparison
from lswt_core.ablation.runs.store import write_json
from lswt_core.errors import UsageError

DECLARED = "declared.json"


class Comparison(NamedTuple):
    """What is asked of the data: another margin, level or first seed is another question."""

    baseline: str  # the key of its runs, whatever their seed
    arm: str  # the same
    name: str  # of the arm
    study: str
    first_seed: int
    margin: float
    confidence: float

    @property
    def key(self) -> str:
        """A hash of all but the names."""
        asked = [self.baseline, self.arm, self.first_seed, self.margin, self.confidence]
        return sha256(json.dumps(asked).encode()).hexdigest()[:20]


class ComparisonRecords:
    """The records of a store."""

    def __init__(self, store: Path) -> None:
        self.root = store / "comparisons"

    def directory(self, one: Comparison) -> Path:
        """Return a comparison's directory."""
        return self.root / one.baseline / one.key

    def declare(self, one: Comparison, looks: Sequence[int], is_seen: bool) -> None:
        """Record at how many seeds verdicts are planned, before the first. What was declared
        stands, unless there are no data to speak of yet (``is_seen``: two pairs have finished).
        """
        directory = self.directory(one)
        text = {**one._asdict(), "looks": list(looks)}
        if not directory.is_dir():
            create_directory(directory, text)
        was_looked_at = max(self.looks(one).taken, default=0) > 1
        if not is_seen and not was_looked_at:
            write_json(directory / DECLARED, text)

    def take_look(self, one: Comparison, seeds: int, differences: Sequence[float]) -> None:
        """Record the paired differences at which a verdict is about to be given."""
        path = self.directory(one) / f"look-{seeds}-{len(differences)}.json"
        write_json(path, {"seeds": seeds, "differences": list(differences)})

    def looks(self, one: Comparison) -> Looks:
        """Return the looks that were declared and those that were taken."""
        declared, taken = read_looks(self.directory(one))
        return find_looks(declared, taken)

    def others(self, own: Sequence[Comparison]) -> list[OtherComparison]:
        """Return all other comparisons with the baseline of these, at their last look, by arm."""
        keys = {one.key for one in own}
        found: list[OtherComparison] = []
        for directory in (self.root / own[0].baseline).glob("[!.]*"):
            if directory.name not in keys:
                found += read_other(directory)
        return sorted(found)


def create_directory(directory: Path, declared: Mapping[str, Any]) -> None:
    """Make a comparison's directory with its declaration; of several processes, one succeeds."""
    temporary = directory.with_name(f".{directory.name}.{token_hex(4)}")
    temporary.mkdir(parents=True)
    write_json(temporary / DECLARED, declared)
    try:
        temporary.rename(directory)  # fails where another process was first
    except OSError:
        shutil.rmtree(temporary)
        if not directory.is_dir():
            raise


def read_looks(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a comparison's declaration and its looks, by seeds and pairs."""
    taken = [read(path) for path in directory.glob("look-*.json")]
    taken.sort(key=lambda look: (look["seeds"], len(look["differences"])))
    return read(directory / DECLARED), taken


def find_looks(declared: Mapping[str, Any], taken: Sequence[Mapping[str, Any]]) -> Looks:
    """Return looks in pairs of runs. A declared look at which some runs had failed is one at fewer
    pairs, besides that at all of them.
    """
    planned = set(declared["looks"])
    pairs = [(look["seeds"], len(look["differences"])) for look in taken]
    incomplete = {count for seeds, count in pairs if seeds in planned and count > 1}
    return Looks(tuple(sorted(planned | incomplete)), tuple(count for _, count in pairs))


def read_other(directory: Path) -> Iterator[OtherComparison]:
    """Yield a comparison at its last look, if it has one."""
    declared, taken = read_looks(directory)
    if taken:
        yield OtherComparison(
            arm=declared["name"],
            study=declared["study"],
            margin=declared["margin"],
            looks=find_looks(declared, taken),
            differences=tuple(taken[-1]["differences"]),
        )


def read(path: Path) -> dict[str, Any]:
    """Read a record. Raises UsageError: without it, looks that were taken would be forgotten."""
    keys = {"looks", "name", "study", "margin"} if path.name == DECLARED else {"differences"}
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if keys <= document.keys():
            return document
        error: Exception = KeyError(*sorted(keys - document.keys()))
    except (ValueError, AttributeError, OSError) as caught:
        error = caught
    raise UsageError(
        f"{path}: the record of earlier looks cannot be read: {error!r}\n  fix: restore it, or"
        " choose another --store"
    ) from error
