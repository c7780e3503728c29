"""A cross-entropy: the formula for some rows at a time, whose logits are forgotten and computed again."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lswt_core.cross_entropy import dense
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import CrossEntropy, Draws, Score


class Example(CrossEntropy):
    """``log sum exp(logits) - logits[label]``, the logits of ``rows`` rows existing at once."""

    name = "example"
    citation = "@misc{lswt_example, title={lswt-example}, author={its authors}}"

    def __init__(self, *, rows: Annotated[int, Ge(1)] = 1) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, z: Tensor, table: Tensor, labels: Tensor, draws: Draws | None = None, *, normaliser: bool = False) -> Score:
        """The score of z [B, T, d_vocab] by a table [V, d_vocab] against labels [B, T]."""
        found = []
        for rows in torch.arange(len(z), device=z.device).split(self.rows):
            drawing = None if draws is None else Draws(draws.uniforms[rows], None if draws.rows is None else draws.rows[rows])
            found.append(checkpoint(self.some, z[rows], table, labels[rows], drawing, normaliser, use_reentrant=False))
        total, correct, sampled, normalisers, *_ = zip(*found, strict=True)
        drawn = None if draws is None else torch.stack(sampled).sum()
        return Score(torch.stack(total).sum(), torch.stack(correct).sum(), drawn, torch.cat(normalisers) if normaliser else None)

    def some(self, z: Tensor, table: Tensor, labels: Tensor, draws: Draws | None, normaliser: bool) -> Score:
        """Change this: the score of some rows, softmax and sums in float32 at least."""
        return dense(z, table, labels, draws, normaliser=normaliser)

    def logits_at_once(self, device: str, tokens: int, table: Tensor) -> int:
        """What a plan of memory must expect at most: it does not know how long rows are."""
        return tokens * len(table)


@hookimpl
def lswt_components() -> list[type]:
    """What this plugin offers."""
    return [Example]
