"""Cross-entropies and auxiliary losses with one mistake each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy
from mutants.expected import CITATION, caught_by


class DenseCrossEntropy(CrossEntropy):
    """A correct cross-entropy, the base of mutants."""

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


@caught_by("reference")
class CountsIgnored(DenseCrossEntropy, CrossEntropy):
    """Treats IGNORE as a label."""

    name = "counts-ignored"

    def forward(
        self, z: Tensor, table: Tensor, labels: Tensor, *rest: Any, **options: Any
    ) -> CrossEntropyOutput:
        return super().forward(z, table, labels.clamp_min(0), *rest, **options)


@caught_by("cross-entropy gradients")
class NoTableGradient(DenseCrossEntropy, CrossEntropy):
    """The gradient of the table is zero."""

    name = "no-table-gradient"

    def forward(self, z: Tensor, table: Tensor, *rest: Any, **options: Any) -> CrossEntropyOutput:
        return super().forward(z, table.detach() + 0 * table, *rest, **options)


@caught_by("sampled labels")
class SameSample(DenseCrossEntropy, CrossEntropy):
    """Ignores the uniform numbers when it samples labels."""

    name = "same-sample"

    def forward(
        self,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        if draws is not None:
            draws = draws._replace(uniforms=torch.full_like(draws.uniforms, 0.5))
        return super().forward(z, table, labels, draws, logsumexp=logsumexp)


@caught_by("logsumexp")
class UnmaskedLogsumexp(DenseCrossEntropy, CrossEntropy):
    """The logsumexp of tokens without a label is not 0."""

    name = "unmasked-logsumexp"

    def forward(self, z: Tensor, table: Tensor, *rest: Any, **options: Any) -> CrossEntropyOutput:
        out = super().forward(z, table, *rest, **options)
        return out._replace(logsumexp=(z @ table.to(z.dtype).T).logsumexp(-1))


@caught_by("soft cap")
class UncappedSample(DenseCrossEntropy, CrossEntropy):
    """Samples labels from the distribution of the logits before the cap."""

    name = "uncapped-sample"
    takes_soft_cap = True

    def forward(
        self,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        logsumexp: bool = False,
        soft_cap: float | None = None,
    ) -> CrossEntropyOutput:
        out = dense_cross_entropy(z, table, labels, draws, logsumexp=logsumexp, soft_cap=soft_cap)
        if draws is None or soft_cap is None:
            return out
        drawn = dense_cross_entropy(z, table, labels, draws).drawn
        assert drawn is not None
        drawn = drawn.masked_fill(labels < 0, IGNORE)
        return out._replace(
            sampled=dense_cross_entropy(z, table, drawn, soft_cap=soft_cap).total, drawn=drawn
        )


class SquaredNorm(AuxiliaryLoss):
    """A correct loss, the base of mutants: the mean squared norm of hidden states of predicted
    tokens.
    """

    citation = CITATION

    def forward(self, out: Output, batch: Batch) -> LossSum:
        squares = out.states.square().sum(-1).masked_fill(batch.labels < 0, 0.0)
        return LossSum(squares.sum(), self.count(batch))


@caught_by("needs")
class UndeclaredLogits(SquaredNorm, AuxiliaryLoss):
    """Uses logits without declaring them in ``needs``."""

    name = "undeclared-logits"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        assert out.logits is not None, "no logits were given"
        return LossSum(out.logits.square().sum(), self.count(batch))


@caught_by("count")
class WrongCount(SquaredNorm, AuxiliaryLoss):
    """Its ``forward`` counts one more than its ``count``."""

    name = "wrong-count"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        loss = super().forward(out, batch)
        return loss._replace(count=loss.count + 1)

    def count(self, batch: Batch) -> Tensor:
        return (batch.labels >= 0).sum()


@caught_by("micro-batches")
class Mean(SquaredNorm, AuxiliaryLoss):
    """Returns a mean as its total."""

    name = "mean"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        loss = super().forward(out, batch)
        return loss._replace(total=loss.total / loss.count.clamp_min(1))


@caught_by("padding")
class CountsPadding(SquaredNorm, AuxiliaryLoss):
    """Includes padding."""

    name = "counts-padding"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        return LossSum(out.states.square().sum(), self.count(batch))

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(batch.labels.numel())


@caught_by("gradcheck")
class HalfGradient(SquaredNorm, AuxiliaryLoss):
    """Half of its gradient is detached."""

    name = "half-gradient"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        return super().forward(out._replace(states=0.5 * (out.states + out.states.detach())), batch)


@caught_by("loss gradient")
class Detached(SquaredNorm, AuxiliaryLoss):
    """Its total is detached."""

    name = "detached"

    def forward(self, out: Output, batch: Batch) -> LossSum:
        return super().forward(out._replace(states=out.states.detach()), batch)
