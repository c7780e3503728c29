"""A cross-entropy: the formula for some rows at a time, whose logits are forgotten and computed
again.
"""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import CrossEntropy, CrossEntropyOutput, LabelSampling
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy


class Example(CrossEntropy):
    """``log sum exp(logits) - logits[label]``, the logits of ``rows`` rows existing at once."""

    name = "example"
    citation = "@misc{lswt_example, title={lswt-example}, author={its authors}}"

    def __init__(self, *, rows: Annotated[int, Ge(1)] = 1) -> None:
        super().__init__()
        self.rows = rows

    def forward(
        self,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        draws: LabelSampling | None = None,
        *,
        logsumexp: bool = False,
    ) -> CrossEntropyOutput:
        """The score of z [B, T, d_vocab] by a table [V, d_vocab] against labels [B, T]."""
        found = []
        for rows in torch.arange(len(z), device=z.device).split(self.rows):
            drawing = (
                None
                if draws is None
                else LabelSampling(
                    draws.uniforms[rows], None if draws.rows is None else draws.rows[rows]
                )
            )
            found.append(
                checkpoint(
                    self.some, z[rows], table, labels[rows], drawing, logsumexp, use_reentrant=False
                )
            )
        total, correct, sampled, normalisers, *_ = zip(*found, strict=True)
        drawn = None if draws is None else torch.stack(sampled).sum()
        return CrossEntropyOutput(
            torch.stack(total).sum(),
            torch.stack(correct).sum(),
            drawn,
            torch.cat(normalisers) if logsumexp else None,
        )

    def some(
        self, z: Tensor, table: Tensor, labels: Tensor, draws: LabelSampling | None, logsumexp: bool
    ) -> CrossEntropyOutput:
        """Change this: the score of some rows, softmax and sums in float32 at least."""
        return dense_cross_entropy(z, table, labels, draws, logsumexp=logsumexp)

    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """What a plan of memory must expect at most: it does not know how long rows are."""
        return tokens * len(table)


@hookimpl
def lswt_components() -> list[type]:
    """What this plugin offers."""
    return [Example]
