"""The vocabulary side of the model: one table for input and output, its projections, and cross-entropy that never holds all
logits.

The table may be narrower than the model: width d_vocab, projected to d_model on the way in and back on the way out, so one
pretrained table (768 wide) serves every size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.interfaces import IGNORE

CHUNK = 256  # tokens whose logits exist at once: 26 MB in bfloat16 at vocabulary 50,272, so they stay in a large cache
CHUNK_TRAINED = 1024  # where the table learns: its gradient is read and written once a chunk, and its product likes more rows
TILE = 1 << 24  # logits turned into probabilities at once, which takes two float32 copies of them
TILE_CPU = 1 << 20  # of which so many stay in a core's own cache


class Vocabulary(nn.Module):
    """Token ids to model states and back, through one table [V, d_vocab]."""

    def __init__(self, vocab_size: int, d_vocab: int, d_model: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, d_vocab)
        self.input = nn.Linear(d_vocab, d_model, bias=False)
        self.output = nn.Linear(d_model, d_vocab, bias=False)

    def freeze(self) -> None:
        """Keep the table out of training, in float16: half the memory, and exact for tables that are stored so (OPT's). It is
        widened where it is used, so that the precision of the rest decides in which precision the model computes.
        """
        self.table.requires_grad_(False).half()

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [B, T] -> [B, T, M]."""
        return self.widen(self.table(ids))

    def widen(self, embedded: Tensor) -> Tensor:
        """Rows of the table [B, T, d_vocab] -> [B, T, M]."""
        return self.input(embedded.to(self.input.weight.dtype))

    def logits(self, states: Tensor) -> Tensor:
        """States [B, T, M] -> [B, T, V]; large: only for those who need every logit."""
        z = self.output(states)  # [B, T, d_vocab]
        return nn.functional.linear(z, self.table.weight.to(z.dtype))

    def score(self, states: Tensor, labels: Tensor, uniforms: Tensor | None = None, *, twice: bool = False) -> Score:
        """Cross-entropy of states [B, T, M] against labels [B, T], or, with uniforms [B, T], against labels drawn from the
        model's own distribution. ``twice`` allows a second derivative, and needs more memory.
        """
        z = self.output(states).flatten(0, 1)  # [B*T, d_vocab]
        labels = labels.flatten()
        if twice:
            return score_twice(z, self.table.weight, labels)
        drawn = None if uniforms is None else uniforms.flatten()
        table = self.table.weight if torch.is_grad_enabled() else self.table.weight.detach()  # a Function cannot tell from inside
        return Score(*ChunkedCrossEntropy.apply(z, table, labels, drawn))


class Score(NamedTuple):
    """How well labels were predicted."""

    total: Tensor  # [] summed negative log-likelihood, natural logarithm; differentiable
    nll: Tensor  # [B*T] per token, 0 where the label is IGNORE
    correct: Tensor  # [] how many labels had the largest logit


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, chunk by chunk, so that logits live only for a moment.

    With p the softmax of a chunk's logits, d total / d z = (p - onehot) @ table and d total / d table = (p - onehot)^T @ z: two
    matrix products where the table is frozen, three where it learns. Logits are taken in the compute precision, softmax and sums
    in float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, table: Tensor, labels: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Z [N, d_vocab], table [V, d_vocab], labels [N], uniforms [N] in [0, 1) -> total [], nll [N], correct []."""
        weight = table.to(z.dtype)  # one cast, not one a chunk
        wants_z, wants_table = ctx.needs_input_grad[:2]
        dz = torch.empty_like(z) if wants_z else None
        dtable = torch.zeros_like(table) if wants_table else None
        nll = torch.zeros(len(z), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
        correct = torch.zeros((), dtype=torch.int64, device=z.device)
        chunk = CHUNK_TRAINED if wants_table else CHUNK
        for start in range(0, len(z), chunk):
            rows = slice(start, start + chunk)
            logits = z[rows] @ weight.T  # [CHUNK, V]
            drawn = None if uniforms is None else uniforms[rows]
            correct += score_chunk(logits, labels[rows], drawn, nll[rows], gradient=wants_z or wants_table)
            if dz is not None:
                torch.mm(logits, weight, out=dz[rows])
            if dtable is not None:
                dtable += logits.T @ z[rows]
        ctx.save_for_backward(dz, dtable)
        ctx.mark_non_differentiable(nll, correct)
        return nll.sum(), nll, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Scale what the forward pass has computed."""
        if torch.is_grad_enabled():  # create_graph=True; once_differentiable would let it pass, since `grad` itself is a constant
            raise RuntimeError("the chunked cross-entropy has no second derivative; ask for score(..., twice=True)")
        dz, dtable = ctx.saved_tensors
        return (
            None if dz is None else dz * grad.to(dz.dtype),
            None if dtable is None else dtable * grad.to(dtable.dtype),
            None,
            None,
        )


def score_chunk(logits: Tensor, labels: Tensor, uniforms: Tensor | None, nll: Tensor, *, gradient: bool) -> Tensor:
    """How many labels [n] have the largest of logits [n, V]; writes ``nll`` [n] and, for a ``gradient``, turns the logits into
    p - onehot where they are, zero where nothing is predicted.
    """
    rows = max(1, (TILE_CPU if logits.device.type == "cpu" else TILE) // logits.shape[1])
    hits = [
        score_tile(tile, label, None if uniforms is None else uniforms[i * rows : (i + 1) * rows], found, gradient)
        for i, (tile, label, found) in enumerate(zip(logits.split(rows), labels.split(rows), nll.split(rows), strict=True))
    ]
    return torch.stack(hits).sum()


def score_tile(logits: Tensor, labels: Tensor, uniforms: Tensor | None, nll: Tensor, gradient: bool) -> Tensor:
    """The same for as many rows as are worked on at once."""
    wide = logits.to(nll.dtype)  # [n, V]
    p = wide.softmax(-1)
    normaliser = wide.amax(-1) - p.amax(-1).log()  # [n], the log of it; by way of the largest, whose p is never near zero
    kept = labels != IGNORE
    target = labels.where(kept, 0) if uniforms is None else draw(p, uniforms)
    torch.mul(normaliser - wide.gather(-1, target[:, None])[:, 0], kept, out=nll)
    hits = ((wide.argmax(-1) == target) & kept).sum()
    if gradient:
        p.scatter_add_(-1, target[:, None], -torch.ones_like(p[:, :1]))
        logits.copy_(p.mul_(kept[:, None]))
    return hits


def score_twice(z: Tensor, table: Tensor, labels: Tensor) -> Score:
    """The same by plain operations, which can be differentiated again; holds the logits."""
    logits = nn.functional.linear(z, table.to(z.dtype)).to(torch.promote_types(z.dtype, torch.float32))
    nll = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    correct = (logits.argmax(-1) == labels).sum()
    return Score(nll.sum(), nll.detach(), correct)


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """One id per row of p [N, V] by inverting its cumulative sum at uniforms [N]: one random number a token, not V."""
    cumulative = p.cumsum(-1)
    threshold = uniforms.to(p.dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(p.shape[-1] - 1)
