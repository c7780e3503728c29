"""Cross-entropies and auxiliary losses, each wrong in one way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lswt_core.interfaces import (
    AuxiliaryLoss,
    Batch,
    CrossEntropy,
    CrossEntropyOutput,
    LabelSampling,
    LossSum,
    Output,
)
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy
from mutants.meant import CITED, meant


class Scoring(CrossEntropy):
    """A right cross-entropy for mutants to spoil."""

    def forward(
        self,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        return dense_cross_entropy(z, table, labels, draws, logsumexp=logsumexp)

    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        return tokens * len(table)


@meant("formula")
class Everything(Scoring, CrossEntropy):
    """Counts labels that are to be ignored."""

    name = "everything"

    def forward(
        self, z: Tensor, table: Tensor, labels: Tensor, *rest: Any, **asked: Any
    ) -> CrossEntropyOutput:
        return super().forward(z, table, labels.clamp_min(0), *rest, **asked)


@meant("gradients of labels")
class Fixed(Scoring, CrossEntropy):
    """Leaves the table as it is."""

    name = "fixed"

    def forward(self, z: Tensor, table: Tensor, *rest: Any, **asked: Any) -> CrossEntropyOutput:
        return super().forward(z, table.detach() + 0 * table, *rest, **asked)


@meant("drawn labels")
class Likeliest(Scoring, CrossEntropy):
    """Always draws the same."""

    name = "likeliest"

    def forward(
        self,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        draws = (
            None if draws is None else draws._replace(uniforms=torch.full_like(draws.uniforms, 0.5))
        )
        return super().forward(z, table, labels, draws, logsumexp=logsumexp)


@meant("logsumexp")
class Unmasked(Scoring, CrossEntropy):
    """Tells a logsumexp of tokens that predict nothing."""

    name = "unmasked"

    def forward(self, z: Tensor, table: Tensor, *rest: Any, **asked: Any) -> CrossEntropyOutput:
        return (
            super()
            .forward(z, table, *rest, **asked)
            ._replace(logsumexp=(z @ table.to(z.dtype).T).logsumexp(-1))
        )


class Price(AuxiliaryLoss):
    """A right loss for mutants to spoil: the mean square of states where a label is predicted."""

    citation = CITED

    def forward(self, out: Output, batch: Batch) -> LossSum:
        squares = out.states.square().sum(-1).masked_fill(batch.labels < 0, 0.0)
        return LossSum(squares.sum(), self.count(batch))


@meant("needs")
class Greedy(Price, AuxiliaryLoss):
    """Uses logits that it does not ask for."""

    name = "greedy"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        assert out.logits is not None, "no logits were given"
        return LossSum(out.logits.square().sum(), self.count(batch))


@meant("count")
class Boasting(Price, AuxiliaryLoss):
    """Counts more than it announces."""

    name = "boasting"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        term = super().forward(out, batch)
        return term._replace(count=term.count + 1)

    def count(self, batch: Batch) -> Tensor:
        return (batch.labels >= 0).sum()


@meant("micro-batches")
class Mean(Price, AuxiliaryLoss):
    """Returns a mean as its total."""

    name = "mean"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        term = super().forward(out, batch)
        return term._replace(total=term.total / term.count.clamp_min(1))


@meant("padding")
class Wasteful(Price, AuxiliaryLoss):
    """Takes padding for text."""

    name = "wasteful"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        return LossSum(out.states.square().sum(), self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.labels.numel())


@meant("gradcheck")
class Careful(Price, AuxiliaryLoss):
    """Half of its gradient is cut off."""

    name = "careful"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        return super().forward(out._replace(states=0.5 * (out.states + out.states.detach())), batch)
