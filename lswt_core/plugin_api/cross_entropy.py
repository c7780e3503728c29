"""Cross-entropy against a vocabulary that never holds all logits, and what else one look at the
logits can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lswt_core.interfaces import IGNORE, CrossEntropyOutput, LabelSampling

TILE = 1 << 24  # logits turned into probabilities at once, which takes two float32 copies of them
TILE_CPU = 1 << 20  # of which so many stay in a core's own cache
COLUMNS = 512  # of a block in which a CPU looks for the place of the largest


class Found(NamedTuple):
    """What is found of each token, [N]."""

    logsumexp: Tensor
    nll: Tensor
    correct: Tensor  # bool
    drawn: Tensor | None
    sampled: Tensor | None  # nll of what was drawn

    @classmethod
    def room(cls, z: Tensor, drawing: bool) -> Found:
        """Of the tokens of z [N, d_vocab], to be filled."""
        wide = z.new_empty(len(z), dtype=torch.promote_types(z.dtype, torch.float32))
        ids = torch.empty_like(wide, dtype=torch.int64) if drawing else None
        return cls(
            wide,
            torch.empty_like(wide),
            torch.empty_like(wide, dtype=torch.bool),
            ids,
            torch.empty_like(wide) if drawing else None,
        )

    def part(self, rows: slice) -> Found:
        """The same memory, of some tokens."""
        return Found(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]


Epilogue: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, Found, bool], None]


class Chunking(NamedTuple):
    """How the tokens are cut up."""

    size: int  # tokens whose logits exist at once
    # a compiled `score_tile`, which takes a chunk in one pass; None: one tile after the other
    epilogue: Epilogue | None = None


def suitable_size(device: str, *, trained: bool) -> int:
    """A chunk that suits a device. 256 tokens of 50,272 logits in bfloat16 take 26 MB, which stay
    in a CPU's large cache. Elsewhere every chunk costs launches, and a product by the table likes
    more rows; so does the gradient of a ``trained`` table.
    """
    return 1024 if trained or device != "cpu" else 256


def chunked(
    z: Tensor,
    table: Tensor,
    labels: Tensor,
    draws: LabelSampling | None = None,
    *,
    logsumexp: bool = False,
    chunking: Chunking | None = None,
) -> CrossEntropyOutput:
    """The score (see ``interfaces.CrossEntropy``), for which logits never exist all at once."""
    uniforms, among = (
        (None, None) if draws is None else (draws.uniforms.flatten(), drawing(draws, labels))
    )
    chunking = chunking or Chunking(suitable_size(z.device.type, trained=table.requires_grad))
    found = ChunkedCrossEntropy.apply(
        z.flatten(0, 1), table, labels.flatten(), uniforms, among, chunking
    )
    total, sampled, log_sum, nll, correct, drawn = (
        t.view_as(labels) if t is not None and t.ndim else t for t in found
    )
    return CrossEntropyOutput(total, correct, sampled, log_sum if logsumexp else None, nll, drawn)


def drawing(draws: LabelSampling, labels: Tensor) -> Tensor | None:
    """For which tokens [N] of some labels [B, T] others are drawn; None: for all."""
    return None if draws.rows is None else draws.rows[:, None].expand_as(labels).flatten()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, chunk by chunk, so that logits
    live only for a moment.

    With p the softmax of a token's logits, E the table, y a label and y' one that was drawn, all
    comes from one product a token: d total / d z = p E - E[y] =: g, d sampled / d z = g + E[y] -
    E[y'], d logsumexp / d z = g + E[y]. The table's gradient takes one more, (p - onehot)^T z; what
    its other gradients need of p, unless it is the same sum, is computed anew in the backward pass.
    Logits are taken in the compute precision, softmax and sums in float32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        uniforms: Tensor | None,
        among: Tensor | None,
        chunking: Chunking,
    ) -> tuple[Any, ...]:
        """Z [N, d_vocab], table [V, d_vocab], labels [N], uniforms [N] in [0, 1) and for which
        tokens they draw, bool [N] -> total [], sampled [], logsumexp [N], nll [N], correct [],
        drawn [N].
        """
        weight = table.to(z.dtype)  # one cast, not one a chunk
        wants_z, wants_table = ctx.needs_input_grad[:2]
        dz = torch.empty_like(z) if wants_z else None
        dtable = None
        found = Found.room(z, drawing=uniforms is not None)
        for rows in slices(len(z), chunking.size):
            logits = z[rows] @ weight.T  # [chunk, V]
            score_tiles = chunking.epilogue or score_chunk
            score_tiles(
                logits,
                labels[rows],
                None if uniforms is None else uniforms[rows],
                found.part(rows),
                wants_z or wants_table,
            )
            if dz is not None:
                torch.mm(logits, weight, out=dz[rows])
            if wants_table:
                own = logits.T @ z[rows]  # [V, d_vocab]
                # a single one is widened where it is scaled
                dtable = own if dtable is None else dtable.to(table.dtype).add_(own)
        ctx.save_for_backward(
            dz, dtable, z if wants_table else None, table, labels, found.drawn, among
        )
        ctx.chunk = chunking.size
        correct = found.correct.sum()
        ctx.mark_non_differentiable(
            found.nll, correct, *(() if found.drawn is None else (found.drawn,))
        )
        ctx.set_materialize_grads(False)
        sampled = found.sampled if among is None or found.sampled is None else found.sampled * among
        return (
            found.nll.sum(),
            None if sampled is None else sampled.sum(),
            found.logsumexp,
            found.nll,
            correct,
            found.drawn,
        )

    @staticmethod
    def backward(
        ctx: Any, total: Tensor | None, sampled: Tensor | None, logsumexp: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        """Scale and shift what the forward pass has computed."""
        # create_graph=True; once_differentiable would let it pass, since `grad` itself is a
        # constant
        if torch.is_grad_enabled():
            raise RuntimeError("the chunked cross-entropy has no second derivative; take `dense`")
        dz, dtable, z, table, labels, drawn, among = ctx.saved_tensors
        if sampled is None and logsumexp is None:
            assert total is not None, "a backward pass starts from one of them"
            return (
                (None if dz is None else dz * total.to(dz.dtype)),
                (None if dtable is None else widened(dtable, table, total)),
                *[None] * 4,
            )
        kept = labels != IGNORE
        label = labels.where(kept, 0)
        taken = (
            torch.zeros_like(kept, dtype=torch.float32)
            if sampled is None
            else sampled * (kept if among is None else kept & among)
        )
        # [N], the factor of p that is not that of `total`
        own = taken if logsumexp is None else taken + logsumexp * kept
        total = own.new_zeros(()) if total is None else total
        if dz is not None:
            dz = dz * (total + own)[:, None].to(dz.dtype)
            add_rows(dz, table, label, own)
            if drawn is not None:
                add_rows(dz, table, drawn, -taken)
        if dtable is not None:
            alike = logsumexp is None and among is None  # one factor for every token
            dtable = widened(
                dtable, table, total + sampled if alike and sampled is not None else total
            )
            add_to_rows(dtable, label, z, own) if alike else add_products(
                dtable, z, table, own, ctx.chunk
            )
            if drawn is not None:
                add_to_rows(dtable, drawn, z, -taken)
        return dz, dtable, *[None] * 4


def widened(dtable: Tensor, table: Tensor, factor: Tensor) -> Tensor:
    """A gradient in the table's own precision, times a factor; a copy."""
    return dtable * factor if dtable.dtype == table.dtype else dtable.to(table.dtype).mul_(factor)


def slices(length: int, size: int) -> Iterator[slice]:
    """A length in pieces of some size."""
    return (slice(start, start + size) for start in range(0, length, size))


def add_rows(total: Tensor, table: Tensor, ids: Tensor, factors: Tensor) -> None:
    """Add the table's rows of ids [N], times factors [N], to [N, d_vocab]."""
    total.addcmul_(table[ids].to(total.dtype), factors[:, None].to(total.dtype))


def add_to_rows(total: Tensor, ids: Tensor, z: Tensor, factors: Tensor) -> None:
    """Add z [N, d_vocab], times factors [N], to those rows of [V, d_vocab] that ids [N] name; in a
    fixed order on any device.
    """
    total.index_put_((ids,), z.to(total.dtype) * factors[:, None].to(total.dtype), accumulate=True)


def add_products(total: Tensor, z: Tensor, table: Tensor, factors: Tensor, chunk: int) -> None:
    """Add p^T z, p the softmax of each token's logits times factors [N], to [V, d_vocab]."""
    weight = table.to(z.dtype)
    for rows in slices(len(z), chunk):
        logits = z[rows] @ weight.T  # [chunk, V]
        for tile in tiles(logits):
            logits[tile] = (
                logits[tile].to(factors.dtype).softmax(-1).mul_(factors[rows][tile, None])
            )
        total += logits.T @ z[rows]


def tiles(logits: Tensor) -> Iterator[slice]:
    """The rows of logits [n, V] that are worked on at once."""
    return slices(
        len(logits), max(1, (TILE_CPU if logits.device.type == "cpu" else TILE) // logits.shape[1])
    )


def score_chunk(
    logits: Tensor, labels: Tensor, uniforms: Tensor | None, found: Found, gradient: bool
) -> None:
    """Fill in what is found of tokens with logits [n, V] and, for a ``gradient``, turn the logits
    into p - onehot where they are, zero where nothing is predicted.
    """
    for rows in tiles(logits):
        score_tile(
            logits[rows],
            labels[rows],
            None if uniforms is None else uniforms[rows],
            found.part(rows),
            gradient,
        )


def score_tile(
    logits: Tensor, labels: Tensor, uniforms: Tensor | None, found: Found, gradient: bool
) -> None:
    """The same for as many rows as are worked on at once."""
    wide = logits.to(found.nll.dtype)  # [n, V]
    p = wide.softmax(-1)
    kept = labels != IGNORE
    label = labels.where(kept, 0)[:, None]
    largest, place = first_largest(wide)
    share = p.gather(-1, place[:, None])[:, 0]  # never near zero
    torch.mul(largest - share.log(), kept, out=found.logsumexp)
    torch.addcmul(found.logsumexp, wide.gather(-1, label)[:, 0], kept, value=-1, out=found.nll)
    torch.logical_and(place == label[:, 0], kept, out=found.correct)
    if uniforms is not None and found.drawn is not None and found.sampled is not None:
        drawn = draw(p, uniforms)
        found.drawn.copy_(drawn)
        torch.addcmul(
            found.logsumexp,
            wide.gather(-1, drawn[:, None])[:, 0],
            kept,
            value=-1,
            out=found.sampled,
        )
    if gradient:
        p.scatter_add_(-1, label, -torch.ones_like(p[:, :1]))
        logits.copy_(p.mul_(kept[:, None]))


def first_largest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row [n, V] and its first place. On a CPU torch finds the number
    five times as fast as the place, which is therefore looked for in one block of columns alone.
    """
    if rows.device.type != "cpu" or rows.shape[1] <= COLUMNS:
        return rows.max(-1)
    blocks = rows.shape[1] // COLUMNS
    whole, rest = rows.split([blocks * COLUMNS, rows.shape[1] % COLUMNS], -1)
    tops = [
        whole.unflatten(1, (blocks, COLUMNS)).amax(-1),
        *([rest.amax(-1, keepdim=True)] if rest.shape[1] else []),
    ]
    largest, block = torch.cat(tops, -1).max(-1)
    # beyond the end the last one stands again
    columns = block[:, None] * COLUMNS + torch.arange(COLUMNS)
    within = rows.gather(-1, columns.clamp_max_(rows.shape[-1] - 1)).max(-1).indices
    return largest, block * COLUMNS + within


def dense(
    z: Tensor,
    table: Tensor,
    labels: Tensor,
    draws: LabelSampling | None = None,
    *,
    logsumexp: bool = False,
) -> CrossEntropyOutput:
    """The same by plain operations, which can be differentiated again; every logit exists, and more
    than once.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    logits = nn.functional.linear(z, table.to(z.dtype)).to(wide).flatten(0, 1)  # [N, V]
    kept = (labels != IGNORE).flatten()

    def nll(of: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, of, ignore_index=IGNORE, reduction="none")

    own, sampled, drawn = nll(labels.flatten()), None, None
    if draws is not None:
        drawn = draw(logits.detach().softmax(-1), draws.uniforms.flatten())
        among = drawing(draws, labels)
        sampled = nll(drawn.masked_fill(~(kept if among is None else kept & among), IGNORE)).sum()
        drawn = drawn.view_as(labels)
    correct = (logits.argmax(-1) == labels.flatten()).sum()
    log_sum = (logits.logsumexp(-1) * kept).view_as(labels) if logsumexp else None
    return CrossEntropyOutput(
        own.sum(), correct, sampled, log_sum, own.detach().view_as(labels), drawn
    )


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """One id per row of p [N, V] by inverting its cumulative sum at uniforms [N]: one random number
    a token, not V.
    """
    cumulative = p.cumsum(-1)
    threshold = uniforms.to(p.dtype)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_max(p.shape[-1] - 1)
