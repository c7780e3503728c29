"""The held-out documents in two parts: one that values are chosen on, one that verdicts are judged
on. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from typing import NamedTuple

from lswt_core.ablation.runs.outcome import Outcome, Study
from lswt_core.errors import UsageError

CHOOSING_SHARE = 3  # one of so many documents is for choosing
FEWEST_DOCUMENTS = 6


class DocumentSplit(NamedTuple):
    """Names of held-out documents."""

    choosing: frozenset[str]
    judging: frozenset[str]


def split_documents(names: Iterable[str]) -> DocumentSplit:
    """Return the split of some documents: every third in the order of their names' hashes is for
    choosing. Raises UsageError if they are too few.
    """
    ordered = sorted(set(names), key=lambda name: (sha256(name.encode()).hexdigest(), name))
    if len(ordered) < FEWEST_DOCUMENTS:
        raise UsageError(
            f"--tune: the held-out text has {len(ordered)} documents: too few to choose values on"
            f" some and to judge arms on others, at least {FEWEST_DOCUMENTS} are needed\n"
            "  fix: raise evaluate.tokens or evaluate.batch_size, or give data more documents"
        )
    choosing = frozenset(ordered[::CHOOSING_SHARE])
    return DocumentSplit(choosing, frozenset(ordered) - choosing)


def loss_on(outcome: Outcome, names: frozenset[str]) -> float | None:
    """Return a finished run's loss per token on some documents; None if it has none of them."""
    chosen = [(total, tokens) for name, total, tokens in outcome.documents if name in names]
    if not chosen:
        return None
    return sum(total for total, _ in chosen) / sum(tokens for _, tokens in chosen)


def judged_on(study: Study, names: frozenset[str]) -> Study:
    """Return a study whose final losses are those on some documents. Curves, evaluations during
    training and losses by position stay those on all of the text.
    """
    arms = []
    for arm in study.arms:
        outcomes = [restrict(outcome, names) for outcome in arm.outcomes]
        arms.append(replace(arm, outcomes=outcomes))
    return replace(study, arms=arms)


def restrict(outcome: Outcome, names: frozenset[str]) -> Outcome:
    """Return an outcome with the losses on some documents, and their share of the text's bytes."""
    if outcome.failure is not None:
        return outcome
    kept = [index for index, (name, *_) in enumerate(outcome.documents) if name in names]
    documents = [outcome.documents[index] for index in kept]
    n_bytes = outcome.evaluated_bytes
    if n_bytes is not None:
        tokens, whole = (sum(n for *_, n in some) for some in (documents, outcome.documents))
        n_bytes = round(n_bytes * tokens / whole)
    return replace(
        outcome,
        documents=documents,
        loss=loss_on(outcome, names),
        unigram=[outcome.unigram[index] for index in kept] if outcome.unigram else [],
        evaluated_bytes=n_bytes,
    )
