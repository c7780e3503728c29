"""What an ablation's runs leave behind, as plain data: one outcome a run, its arms, and the whole
study.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What one run of one arm came to."""

    seed: int
    failure: str | None = None  # None: finished; else "diverged: ...", "killed by signal 9 ..."
    loss: float | None = None  # held-out cross-entropy at the end, nats per token
    # held-out document, summed loss in nats, tokens
    documents: list[tuple[str, float, int]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)  # tokens trained on, training loss
    # tokens trained on, held-out loss
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    # tokens of the document read before (from), mean loss, tokens
    positions: list[tuple[int, float, int]] = field(default_factory=list)
    # "isotropy", "attention_first_token", "attention_registers", ...
    probes: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    seconds: float = 0.0  # of training

    @classmethod
    def failed(cls, seed: int, why: str) -> Outcome:
        """A run that left nothing."""
        return cls(seed, why)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Outcome:
        """From plain data."""
        values: dict[str, Any] = {
            one.name: found[one.name] for one in fields(cls) if one.name in found
        }
        rows = {
            name: [tuple(row) for row in value]
            for name, value in values.items()
            if isinstance(value, list)
        }
        return cls(**(values | rows))


@dataclass(frozen=True)
class Arm:
    """One arm with its runs."""

    name: str
    swap: str  # "" for the baseline
    changes: list[dict[str, Any]]  # against the baseline: key, before, after, where
    parameters: int
    trainable: int
    flops_per_token: int | None  # of training; None: unknown
    tokens: int  # that every run is trained on
    by_component: dict[str, int]  # parameters
    components: list[dict[str, str]]  # kind, name, distribution, version, citation
    outcomes: list[Outcome]  # in the order of the study's seeds

    @property
    def training_flops(self) -> int | None:
        """The work of a whole run's training; None: unknown."""
        return None if self.flops_per_token is None else self.flops_per_token * self.tokens


@dataclass(frozen=True)
class Study:
    """An ablation that was run."""

    name: str
    arms: list[Arm]  # the baseline first
    # seeds, confidence, margin (nats per token), steps, tokens, match, ...
    settings: dict[str, Any]
    certificate: list[dict[str, Any]]
    environment: dict[str, Any]
    recipe: str  # the baseline's, resolved
    command: str
