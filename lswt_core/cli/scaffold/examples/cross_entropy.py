"""A cross-entropy that recomputes its logits in the backward pass, some rows at a time."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import CrossEntropy, CrossEntropyOutput, LabelSampling
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy


class Example(CrossEntropy):
    """``logsumexp(logits) - logits[label]``; the logits of ``rows`` rows exist at once."""

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

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
        """Cross-entropy of z [B, T, d_vocab] by a table [V, d_vocab] against labels [B, T]."""
        outputs = []
        for rows in torch.arange(len(z), device=z.device).split(self.rows):
            some_draws = None
            if draws is not None:
                which = None if draws.rows is None else draws.rows[rows]
                some_draws = LabelSampling(draws.uniforms[rows], which)
            outputs.append(
                checkpoint(
                    self.score_rows,
                    z[rows],
                    table,
                    labels[rows],
                    some_draws,
                    logsumexp,
                    use_reentrant=False,
                )
            )
        total, correct, sampled, logsumexps, *_ = zip(*outputs, strict=True)
        return CrossEntropyOutput(
            torch.stack(total).sum(),
            torch.stack(correct).sum(),
            None if draws is None else torch.stack(sampled).sum(),
            torch.cat(logsumexps) if logsumexp else None,
        )

    def score_rows(
        self, z: Tensor, table: Tensor, labels: Tensor, draws: LabelSampling | None, logsumexp: bool
    ) -> CrossEntropyOutput:
        """Change this: the cross-entropy of some rows, softmax and sums in float32 at least."""
        return dense_cross_entropy(z, table, labels, draws, logsumexp=logsumexp)

    def peak_logits(self, device: str, tokens: int, table: Tensor) -> int:
        """An upper bound, for memory estimates: how many rows ``tokens`` are is not known here."""
        return tokens * len(table)


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
