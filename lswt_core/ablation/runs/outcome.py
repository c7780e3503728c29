"""The results of an ablation as plain data: the outcome of each run, the results of each arm, and
the whole study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

UNFINISHED = "not finished"  # the failure of a run that was not made, or not to its end


@dataclass(frozen=True)
class Outcome:
    """The result of one run of one arm."""

    seed: int
    failure: str | None = (
        None  # None: finished without failure; else "diverged: ...", "killed by signal 9 ..."
    )
    loss: float | None = None  # held-out cross-entropy at the end, nats per token
    # held-out document, summed loss in nats, tokens
    documents: list[tuple[str, float, int]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)  # tokens trained on, training loss
    # tokens trained on, held-out loss
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    # preceding tokens of the document (lower edge of a bucket), mean loss, tokens
    positions: list[tuple[int, float, int]] = field(default_factory=list)
    # "isotropy", "attention_first_token", "attention_registers", ...
    probes: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    seconds: float = 0.0  # of training
    # --- since the first version: absent in outcomes that are older
    # what the run itself found against its certificate: about, text (see certificate.Flaw)
    flaws: list[tuple[str, str]] = field(default_factory=list)
    unigram: list[float] = field(default_factory=list)  # of ``documents``: summed loss by the
    # unigram model of the training text; empty: it is not known
    evaluated_bytes: int | None = None  # their share of the held-out text, UTF-8
    evaluated_text: str | None = None  # a hash of the evaluated tokens
    text: str | None = None  # the data source's fingerprint of training and held-out text
    warnings: list[str] = field(default_factory=list)  # that the run printed
    runs_at_once: int | None = None  # on this machine by the same command, this one included
    # "kind/name" of components: distribution, version, sha256 of the source
    code: dict[str, dict[str, str]] = field(default_factory=dict)
    core: dict[str, str | None] = field(default_factory=dict)  # version, sha256, commit

    @classmethod
    def failed(cls, seed: int, why: str) -> Outcome:
        """Return the outcome of a run that left no results."""
        return cls(seed, why)

    @classmethod
    def unfinished(cls, seed: int) -> Outcome:
        """Return the outcome of a run that was not made, or not to its end: no failure counts."""
        return cls(seed, UNFINISHED)

    @property
    def unigram_loss(self) -> float | None:
        """The mean loss of ``documents`` by the unigram model; None: it is not known."""
        if not self.unigram:
            return None
        return sum(self.unigram) / sum(tokens for *_, tokens in self.documents)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Outcome:
        """Return the outcome that ``to_json`` gave; keys that are unknown are ignored."""
        values: dict[str, Any] = {}
        for field_ in fields(cls):
            if field_.name not in document:
                continue
            value = document[field_.name]
            if isinstance(value, list):
                value = [tuple(row) if isinstance(row, list) else row for row in value]
            values[field_.name] = value
        return cls(**values)


@dataclass(frozen=True)
class ArmResult:
    """An arm, or the baseline, with the outcomes of its runs."""

    name: str
    swap: str  # "" for the baseline
    changes: list[dict[str, Any]]  # against the baseline: key, before, after, where
    parameters: int
    trainable: int
    flops_per_token: int | None  # of training; None: unknown
    tokens: int  # that each run is trained on
    by_component: dict[str, int]  # parameters
    components: list[dict[str, str]]  # kind, name, distribution, version, citation
    outcomes: list[Outcome]  # in the order of the study's seeds
    # by seed: the key of the run and its directory
    stored: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def training_flops(self) -> int | None:
        """FLOPs of the training of one run; None: unknown."""
        return None if self.flops_per_token is None else self.flops_per_token * self.tokens

    def finished_runs(self) -> list[Outcome]:
        """Return the runs that finished without failure."""
        return [one for one in self.outcomes if one.failure is None]

    def failed_runs(self) -> list[Outcome]:
        """Return the runs that failed; those that are not finished have not."""
        return [one for one in self.outcomes if one.failure not in (None, UNFINISHED)]

    def unfinished_seeds(self) -> list[int]:
        """Return the seeds whose runs are not finished."""
        return [one.seed for one in self.outcomes if one.failure == UNFINISHED]

    def finished_pairs(self, baseline: ArmResult) -> list[tuple[Outcome, Outcome]]:
        """Return the baseline's run and the arm's at every seed at which both finished."""
        pairs = zip(baseline.outcomes, self.outcomes, strict=True)
        return [(one, other) for one, other in pairs if one.failure is other.failure is None]

    def differences(self, baseline: ArmResult) -> list[float]:
        """Return held-out loss less the baseline's, at every seed at which both finished."""
        pairs = self.finished_pairs(baseline)
        return [(other.loss or 0.0) - (one.loss or 0.0) for one, other in pairs]


class Looks(NamedTuple):
    """The numbers of pairs at which verdicts about one arm were planned, and given."""

    declared: tuple[int, ...]
    taken: tuple[int, ...] = ()


class OtherComparison(NamedTuple):
    """An earlier comparison with the same baseline, at its last look."""

    arm: str
    study: str
    margin: float
    looks: Looks
    differences: tuple[float, ...]  # of pairs


@dataclass(frozen=True)
class Study:
    """The results of an ablation."""

    name: str
    arms: list[ArmResult]  # the baseline first
    # seeds, confidence, margin (nats per token), steps, tokens, match, ...
    settings: dict[str, Any]
    certificate: list[dict[str, Any]]
    environment: dict[str, Any]
    recipe: str  # the baseline's, resolved
    command: str
    looks: Mapping[str, Looks] = field(default_factory=dict)  # by arm; none: one, at these seeds
    others: Sequence[OtherComparison] = ()  # with the same baseline, in the same store
    # of the baseline's recipe: key, value, where (it is written), owner (``Recipe.origins``)
    values: Sequence[Mapping[str, Any]] = ()
