"""The training loss: cross-entropy plus weighted auxiliary losses, as sums and counts that add up
over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.errors import Incompatible
from lswt_core.interfaces import (
    IGNORE,
    AuxiliaryLoss,
    Batch,
    CrossEntropy,
    CrossEntropyOutput,
    LabelSampling,
    LossSum,
    Output,
    Scaling,
)
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.cross_entropy import chunked_cross_entropy, dense_cross_entropy

CROSS_ENTROPY = "cross_entropy"
SAMPLED = "sampled"  # cross-entropy against labels sampled from the model


class BatchLoss(NamedTuple):
    """The loss of one batch; where ``counts`` are given, its share of the step's loss."""

    loss: Tensor  # [] shares add up
    state: tuple[dict[str, Any], ...]  # the memories' next state, by layer
    terms: dict[str, LossSum]  # cross-entropy and every auxiliary loss
    correct: Tensor  # [] labels predicted correctly
    sampled: Tensor | None = None  # [] loss against sampled labels; shares add up


class TrainModule(nn.Module):
    """Decoder, cross-entropy and auxiliary losses: from a batch to its loss."""

    # besides ``forward``: what else of the model is called on its own, with parameters in place
    forward_methods = ("hidden_states", "logits")

    def __init__(
        self,
        decoder: Decoder,
        auxiliary: Mapping[str, tuple[AuxiliaryLoss, float]],
        cross_entropy: CrossEntropy | None = None,
        scalings: Mapping[str, Scaling] = MappingProxyType({}),
    ) -> None:
        """``auxiliary`` are losses with their weights; without a ``cross_entropy`` component,
        ``chunked_cross_entropy`` is used. ``scalings`` are the parametrisation's, by name.
        """
        super().__init__()
        self.decoder, self.cross_entropy = decoder, cross_entropy
        self.auxiliary = nn.ModuleDict({name: loss for name, (loss, _) in auxiliary.items()})
        weights = {name: weight for name, (_, weight) in auxiliary.items()}
        self.scalings = scalings
        self.weights = {CROSS_ENTROPY: 1.0} | weights | layer_loss_weights(decoder, auxiliary)
        needs = [loss.needs for loss, _ in auxiliary.values()]
        self.needs: frozenset[str] = frozenset().union(*needs)
        # labels beyond a segment's end that some loss reads
        self.lookahead = max((loss.lookahead for loss, _ in auxiliary.values()), default=0)

    def forward(
        self,
        batch: Batch,
        state: tuple[Mapping[str, Any], ...] | None = None,
        counts: Mapping[str, Tensor] | None = None,
        *,
        draws: LabelSampling | None = None,
        cross_entropy_only: bool = False,
        create_graph: bool = False,
    ) -> BatchLoss:
        """The loss of a batch. ``counts`` are the denominators of the whole step (``self.counts``
        summed over micro-batches and ranks); without them the batch's own are used.

        With ``draws`` the cross-entropy against labels sampled from the model is computed too (for
        the Gauss-Newton-Bartlett estimate). ``cross_entropy_only`` leaves auxiliary losses out.
        ``create_graph`` allows second derivatives.
        """
        layer_losses: dict[str, LossSum] = {}
        states, next_state = self.decoder(
            batch.inputs, state, batch.first_visible, losses=layer_losses
        )
        score = self.score(
            states,
            batch.labels,
            draws,
            logsumexp="logsumexp" in self.needs and not cross_entropy_only,
            create_graph=create_graph,
        )
        terms = {CROSS_ENTROPY: LossSum(score.total, count_labels(batch))}
        if not cross_entropy_only:
            auxiliary = self.auxiliary_terms(states, score, batch, create_graph=create_graph)
            terms |= auxiliary | layer_losses
        shares = [
            self.weights[name] * mean_loss(term, name, counts) for name, term in terms.items()
        ]
        sampled = None
        if draws is not None and score.sampled is not None:
            term = LossSum(score.sampled, count_labels(batch, draws.rows))
            sampled = mean_loss(term, SAMPLED, counts)
        return BatchLoss(torch.stack(shares).sum(), next_state, terms, score.correct, sampled)

    def hidden_states(
        self,
        inputs: Tensor,
        state: tuple[Mapping[str, Any], ...] | None = None,
        first_visible: Tensor | None = None,
    ) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
        """The decoder alone: token ids [B, T] -> hidden states [B, T, M] and the next state."""
        states, next_state = self.decoder(inputs, state, first_visible)
        return states, next_state

    def logits(self, states: Tensor) -> Tensor:
        """The head alone: hidden states [..., M] -> logits [..., V]."""
        return self.decoder.vocabulary.logits(states)

    def auxiliary_terms(
        self,
        states: Tensor,
        score: CrossEntropyOutput,
        batch: Batch,
        *,
        create_graph: bool = False,
    ) -> dict[str, LossSum]:
        """Every auxiliary loss of hidden states [B, T, M]."""
        logits = self.decoder.vocabulary.logits(states) if "logits" in self.needs else None
        scorer = None
        if "score" in self.needs:
            scorer = partial(self.score, create_graph=create_graph)
        out = Output(states, logits, score.logsumexp, scorer)
        return {name: loss(out, batch) for name, loss in self.auxiliary.items()}

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
        by: Callable[..., CrossEntropyOutput] = self.cross_entropy or chunked_cross_entropy
        if create_graph:
            by = dense_cross_entropy
        return self.decoder.vocabulary.score(states, labels, draws, by=by, logsumexp=logsumexp)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The count of every loss term, known before the batch is run."""
        counts = {CROSS_ENTROPY: count_labels(batch)}
        for name, loss in self.auxiliary.items():
            assert isinstance(loss, AuxiliaryLoss)
            counts[name] = loss.count(batch)
        for layer in self.decoder.layers():
            for name in layer.loss_weights:
                counts[name] = counts.get(name, 0) + layer.loss_count(name, batch)
        return counts


def layer_loss_weights(decoder: Decoder, auxiliary: Container[str]) -> dict[str, float]:
    """The weights of the loss terms that layers return. Raises Incompatible if a term has two
    weights, or the name of another loss.
    """
    weights: dict[str, float] = {}
    for layer in decoder.layers():
        for name, weight in layer.loss_weights.items():
            if name in auxiliary or name in (CROSS_ENTROPY, SAMPLED):
                raise Incompatible(f"{layer.name!r} returns a loss called {name!r}, as another is")
            if weights.setdefault(name, weight) != weight:
                raise Incompatible(
                    f"layers give the loss {name!r} the weights {weights[name]} and {weight}: terms"
                    " of one name are added over layers; give all layers the same weight"
                )
    return weights


def count_labels(batch: Batch, rows: Tensor | None = None) -> Tensor:
    """The number of labels that are not IGNORE in a batch, or in its rows bool [B]."""
    predicted = batch.labels != IGNORE
    if rows is not None:
        predicted = predicted & rows[:, None]
    return predicted.sum()


def mean_loss(term: LossSum, name: str, counts: Mapping[str, Tensor] | None) -> Tensor:
    """A loss term divided by the step's count of it, or without ``counts`` by its own."""
    count = term.count if counts is None else counts[name]
    return term.total / count.clamp_min(1)
