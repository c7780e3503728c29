"""Per-token results of a chunk of logits: logsumexp, negative log-likelihood, accuracy, labels
sampled from the model, and the gradient of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lswt_core.interfaces import IGNORE

TILE = 1 << 24  # logits whose softmax is taken at once, which needs two float32 copies of them
TILE_CPU = 1 << 20  # so many stay in a CPU core's cache
COLUMNS = 512  # of a block in which a CPU searches for the index of the largest logit


def cap_logits(logits: Tensor, soft_cap: float) -> Tensor:
    """``soft_cap * tanh(logits / soft_cap)``, of any shape."""
    return soft_cap * (logits / soft_cap).tanh()


def cap_slope(capped: Tensor, soft_cap: float) -> Tensor:
    """The derivative of ``cap_logits`` where it returned ``capped``."""
    return 1 - (capped / soft_cap).square()


class TokenScores(NamedTuple):
    """Results per token, [N]; 0 or False where the label is IGNORE (but ``drawn`` and slopes)."""

    logsumexp: Tensor
    nll: Tensor
    correct: Tensor  # bool
    drawn: Tensor | None  # labels sampled from the model
    sampled: Tensor | None  # nll of these
    # where logits are capped: the cap's derivative at the logits of labels and of sampled labels
    label_slope: Tensor | None = None
    drawn_slope: Tensor | None = None

    @classmethod
    def allocate(cls, z: Tensor, *, with_samples: bool, capped: bool = False) -> TokenScores:
        """Uninitialised memory for the tokens of z [N, d_vocab], in float32 or wider."""
        nll = z.new_empty(len(z), dtype=torch.promote_types(z.dtype, torch.float32))
        return cls(
            torch.empty_like(nll),
            nll,
            torch.empty_like(nll, dtype=torch.bool),
            torch.empty_like(nll, dtype=torch.int64) if with_samples else None,
            torch.empty_like(nll) if with_samples else None,
            torch.empty_like(nll) if capped else None,
            torch.empty_like(nll) if capped and with_samples else None,
        )

    def rows(self, rows: slice) -> TokenScores:
        """Views of some tokens' results."""
        return TokenScores(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]


def score_chunk(
    logits: Tensor,
    labels: Tensor,
    uniforms: Tensor | None,
    scores: TokenScores,
    gradient: bool,
    soft_cap: float | None = None,
) -> None:
    """Fill in ``scores`` of tokens with logits [n, V], labels [n] and, to sample labels, uniforms
    [n] in [0, 1). The logits are soft-capped first if there is a cap. With ``gradient``, overwrite
    them by p - onehot(label), times the cap's derivative, 0 where the label is IGNORE.
    """
    for rows in row_tiles(logits):
        tile_uniforms = None if uniforms is None else uniforms[rows]
        score_tile(logits[rows], labels[rows], tile_uniforms, scores.rows(rows), gradient, soft_cap)


def score_tile(
    logits: Tensor,
    labels: Tensor,
    uniforms: Tensor | None,
    scores: TokenScores,
    gradient: bool,
    soft_cap: float | None = None,
) -> None:
    """``score_chunk`` for so few logits that copies of all of them are affordable."""
    wide = logits.to(scores.nll.dtype)  # [n, V]
    if soft_cap is not None:
        wide = cap_logits(wide, soft_cap)
    p = wide.softmax(-1)
    kept = labels != IGNORE
    label = labels.where(kept, 0)[:, None]
    largest, index = max_with_index(wide)
    largest_p = p.gather(-1, index[:, None])[:, 0]  # at least 1 / V
    torch.mul(largest - largest_p.log(), kept, out=scores.logsumexp)
    label_logits = wide.gather(-1, label)[:, 0]
    torch.addcmul(scores.logsumexp, label_logits, kept, value=-1, out=scores.nll)
    torch.logical_and(index == label[:, 0], kept, out=scores.correct)
    if soft_cap is not None and scores.label_slope is not None:
        scores.label_slope.copy_(cap_slope(label_logits, soft_cap))
    if uniforms is not None:
        score_sampled_labels(wide, p, uniforms, kept, scores, soft_cap)
    if gradient:
        error = subtract_onehot_(p, label)
        if soft_cap is not None:
            error.mul_(cap_slope(wide, soft_cap))
        logits.copy_(error.mul_(kept[:, None]))


def subtract_onehot_(p: Tensor, label: Tensor) -> Tensor:
    """Return p [n, V] - onehot(label [n, 1]); p may be overwritten. Compiled code compares instead
    of scattering: a scatter is a kernel of its own, which needs all of p in memory.
    """
    if torch.compiler.is_compiling():
        return p - (torch.arange(p.shape[-1], device=p.device) == label).to(p.dtype)
    return p.scatter_add_(-1, label, -torch.ones_like(p[:, :1]))


def score_sampled_labels(
    logits: Tensor,
    p: Tensor,
    uniforms: Tensor,
    kept: Tensor,
    scores: TokenScores,
    soft_cap: float | None,
) -> None:
    """Sample a label for each token from p [n, V], the softmax of logits [n, V], by uniforms [n],
    and fill in its scores; the nll is 0 where ``kept`` [n] is False.
    """
    if scores.drawn is None or scores.sampled is None:
        return
    drawn = sample_labels(p, uniforms)
    scores.drawn.copy_(drawn)
    drawn_logits = logits.gather(-1, drawn[:, None])[:, 0]
    torch.addcmul(scores.logsumexp, drawn_logits, kept, value=-1, out=scores.sampled)
    if soft_cap is not None and scores.drawn_slope is not None:
        scores.drawn_slope.copy_(cap_slope(drawn_logits, soft_cap))


def max_with_index(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``rows.max(-1)`` of rows [n, V], the first index where several are equal.

    On a CPU torch finds the value five times as fast as the index, which is therefore searched in
    the block of columns that holds the value.
    """
    if rows.device.type != "cpu" or rows.shape[1] <= COLUMNS:
        return rows.max(-1)
    n_blocks, remainder = rows.shape[1] // COLUMNS, rows.shape[1] % COLUMNS
    blocks, rest = rows.split([n_blocks * COLUMNS, remainder], -1)
    block_max = [blocks.unflatten(1, (n_blocks, COLUMNS)).amax(-1)]
    if remainder:
        block_max.append(rest.amax(-1, keepdim=True))
    largest, block = torch.cat(block_max, -1).max(-1)
    # columns beyond the last are the last one again
    columns = block[:, None] * COLUMNS + torch.arange(COLUMNS)
    within = rows.gather(-1, columns.clamp_max_(rows.shape[-1] - 1)).max(-1).indices
    return largest, block * COLUMNS + within


def sample_labels(p: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one id per row of p [N, V] by inverting its cumulative sum at uniforms [N]: one random
    number a token, not V.
    """
    cumulative = p.cumsum(-1)
    threshold = uniforms.to(p.dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(p.shape[-1] - 1)


def row_tiles(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of logits [n, V], each of about TILE logits."""
    tile = TILE_CPU if logits.device.type == "cpu" else TILE
    return split_range(len(logits), max(1, tile // logits.shape[1]))


def split_range(length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of ``size`` that cover ``length``."""
    return (slice(start, start + size) for start in range(0, length, size))
