"""What is minimised: cross-entropy plus weighted auxiliary losses, as fractions that add up over
micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.interfaces import (
    IGNORE,
    AuxiliaryLoss,
    Batch,
    CrossEntropy,
    CrossEntropyOutput,
    LabelSampling,
    LossSum,
    Output,
)
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.cross_entropy import chunked, dense

CROSS_ENTROPY = "cross_entropy"
SAMPLED = "sampled"  # cross-entropy against labels that the model draws itself


class Result(NamedTuple):
    """What one batch contributed."""

    loss: Tensor  # [] this batch's share of the training loss; shares add up
    state: tuple[dict[str, Any], ...]  # the next memory, by layer
    terms: dict[str, LossSum]  # cross-entropy and every auxiliary loss
    correct: Tensor  # [] labels predicted right
    # [] this batch's share of the loss of drawn labels; shares add up
    sampled: Tensor | None = None


class TrainModule(nn.Module):
    """Decoder, cross-entropy and auxiliary losses: the one module that is compiled, wrapped or
    measured.
    """

    def __init__(
        self,
        decoder: Decoder,
        auxiliary: Mapping[str, tuple[AuxiliaryLoss, float]],
        cross_entropy: CrossEntropy | None = None,
    ) -> None:
        """Without a component of its kind, the cross-entropy is taken by ``chunked``."""
        super().__init__()
        self.decoder, self.cross_entropy = decoder, cross_entropy
        self.auxiliary = nn.ModuleDict({name: loss for name, (loss, _) in auxiliary.items()})
        self.weights = {CROSS_ENTROPY: 1.0} | {
            name: weight for name, (_, weight) in auxiliary.items()
        }
        self.needs: frozenset[str] = frozenset().union(
            *(loss.needs for loss, _ in auxiliary.values())
        )

    def forward(
        self,
        batch: Batch,
        state: tuple[Mapping[str, Any], ...] | None = None,
        counts: Mapping[str, Tensor] | None = None,
        *,
        draws: LabelSampling | None = None,
        cross_entropy_only: bool = False,
        create_graph: bool = False,
    ) -> Result:
        """The loss of a batch. ``counts`` are what the whole step averages over; without them the
        batch is the whole.

        With ``draws`` the cross-entropy against labels drawn from the model is taken besides (the
        Gauss-Newton-Bartlett estimate). ``alone`` leaves auxiliary losses out. ``twice`` allows a
        second derivative.
        """
        states, following = self.decoder(batch.inputs, state, batch.first_visible)
        score = self.score(
            states,
            batch.labels,
            draws,
            logsumexp="logsumexp" in self.needs and not cross_entropy_only,
            create_graph=create_graph,
        )
        terms = {CROSS_ENTROPY: LossSum(score.total, predicted(batch))}
        if self.auxiliary and not cross_entropy_only:
            logits = self.decoder.vocabulary.logits(states) if "logits" in self.needs else None
            out = Output(states, logits, score.logsumexp)
            terms |= {name: loss(out, batch) for name, loss in self.auxiliary.items()}
        shares = [self.weights[name] * mean(term, name, counts) for name, term in terms.items()]
        sampled = None
        if draws is not None and score.sampled is not None:
            sampled = mean(LossSum(score.sampled, predicted(batch, draws.rows)), SAMPLED, counts)
        return Result(torch.stack(shares).sum(), following, terms, score.correct, sampled)

    def score(
        self,
        states: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        logsumexp: bool = False,
        create_graph: bool = False,
    ) -> CrossEntropyOutput:
        """The cross-entropy of states [B, T, M] against labels [B, T]."""
        by = dense if create_graph else self.cross_entropy or chunked
        return self.decoder.vocabulary.score(states, labels, draws, by=by, logsumexp=logsumexp)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What every term of a batch will count, before the batch is run."""
        return {CROSS_ENTROPY: predicted(batch)} | {
            name: count_of(loss, batch) for name, loss in self.auxiliary.items()
        }


def count_of(loss: nn.Module, batch: Batch) -> Tensor:
    """What an auxiliary loss will count."""
    assert isinstance(loss, AuxiliaryLoss)
    return loss.count(batch)


def predicted(batch: Batch, rows: Tensor | None = None) -> Tensor:
    """How many labels of a batch, or of some of its rows, bool [B], are predicted."""
    found = batch.labels != IGNORE
    return found.sum() if rows is None else (found & rows[:, None]).sum()


def mean(term: LossSum, name: str, counts: Mapping[str, Tensor] | None) -> Tensor:
    """A term over its own count, or over what the whole step counts."""
    return term.total / (term.count if counts is None else counts[name]).clamp_min(1)
