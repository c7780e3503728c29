"""Feed-forward layers with state or loss terms, with one mistake each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.interfaces import (
    Batch,
    Dims,
    FeedForward,
    LayerContext,
    LayerOutput,
    LossSum,
    State,
    StatefulFeedForward,
)
from mutants.expected import CITATION, caught_by


class Gated(StatefulFeedForward):
    """A correct layer, the base of mutants: a gate, and the squared mean gate of every row as a
    loss.
    """

    citation = CITATION
    loss_weights = {"open": 0.1}  # noqa: RUF012

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc, self.gate = nn.Linear(dims.d_model, dims.d_model), nn.Linear(dims.d_model, 1)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State, context: LayerContext
    ) -> LayerOutput:
        gate = self.gate(x).sigmoid()  # [B, T, 1]
        return LayerOutput(self.fc(x) * gate, None, {}, {"open": self.loss(gate)})

    def loss(self, gate: Tensor) -> LossSum:
        return LossSum(gate.mean((1, 2)).square().sum(), torch.tensor(len(gate)))

    def loss_count(self, name: str, batch: Batch) -> Tensor:
        return torch.tensor(len(batch.inputs))


@caught_by("loss terms")
class UndeclaredTerm(Gated, FeedForward):
    """Returns a loss term that it does not declare."""

    name, loss_weights = "undeclared-term", {}


@caught_by("loss terms")
class MissingTerm(Gated, FeedForward):
    """Declares a loss term that it does not return."""

    name, loss_weights = "missing-term", {"open": 0.1, "shut": 0.1}


@caught_by("count")
class CountsLabels(Gated, FeedForward):
    """Says that it counts labels, and counts rows."""

    name = "counts-labels"

    def loss_count(self, name: str, batch: Batch) -> Tensor:
        return FeedForward.loss_count(self, name, batch)


@caught_by("micro-batches")
class BalancesTheBatch(Gated, FeedForward):
    """Squares the mean over the batch."""

    name = "balances-the-batch"

    def loss(self, gate: Tensor) -> LossSum:
        return LossSum(gate.mean().square() * len(gate), torch.tensor(len(gate)))


@caught_by("loss gradient")
class DetachedTerm(Gated, FeedForward):
    """Its loss term is detached."""

    name = "detached-term"

    def loss(self, gate: Tensor) -> LossSum:
        return super().loss(gate.detach())


@caught_by("forward")
class ReturnsTuple(Gated, FeedForward):
    """Returns output and state without a LayerOutput."""

    name = "returns-tuple"

    def forward(self, *given: Any) -> Any:
        return super().forward(*given).x, None


class Shifted(StatefulFeedForward):
    """A correct layer, the base of mutants: sees the token before each one."""

    citation, reach = CITATION, 1

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc = nn.Linear(dims.d_model, dims.d_model)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State, context: LayerContext
    ) -> LayerOutput:
        last = torch.zeros_like(x[:, :1]) if state is None else state
        before = torch.cat((last, x), 1)[:, :-1]
        if context.first_visible is not None:
            hidden = context.first_visible >= context.positions
            before = before.masked_fill(hidden[..., None], 0)
        return LayerOutput(self.fc(x + before), self.keep(x, state))

    def keep(self, x: Tensor, state: State) -> Tensor:
        return x[:, -1:].detach()


@caught_by("reach")
class KeepsTwo(Shifted, FeedForward):
    """Keeps the sum of the last tokens of two segments."""

    name = "keeps-two"

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State, context: LayerContext
    ) -> LayerOutput:
        out = super().forward(x, None if state is None else state[:, 1:], context)
        older = out.state if state is None else state[:, 1:]
        return out._replace(state=torch.cat((older, out.state), 1))


@caught_by("documents")
class ShiftsAcrossDocuments(Shifted, FeedForward):
    """The first token of a document sees the last one of another."""

    name = "shifts-across-documents"

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State, context: LayerContext
    ) -> LayerOutput:
        return super().forward(x, state, context._replace(first_visible=None))
