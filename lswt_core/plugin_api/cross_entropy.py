"""Cross-entropy over a large vocabulary: chunked, so that not all logits exist at once, and dense,
which has a second derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lswt_core.interfaces import IGNORE, CrossEntropyOutput, LabelSampling
from lswt_core.plugin_api.token_scores import (
    TokenScores,
    cap_logits,
    cap_slope,
    row_tiles,
    sample_labels,
    score_chunk,
    split_range,
)

# a function like `score_chunk`
Epilogue: TypeAlias = Callable[
    [Tensor, Tensor, Tensor | None, TokenScores, bool, float | None], None
]


class Chunking(NamedTuple):
    """How tokens are split into chunks, and how a chunk's logits are scored."""

    size: int  # tokens whose logits exist at once
    # a compiled `score_tile`, which takes a chunk in one pass; None: `score_chunk`
    epilogue: Epilogue | None = None
    soft_cap: float | None = None  # of the logits


def default_chunk_size(device: str, *, trained: bool) -> int:
    """Tokens per chunk. 256 tokens of 50,272 logits in bfloat16 take 26 MB, which stay in a CPU's
    cache. Elsewhere every chunk costs kernel launches, and a product with the table likes more
    rows; so does the gradient of a ``trained`` table, a float32 sum that each chunk reads and
    writes (of 50,272 rows 768 wide: 310 MB, as much as 1,024 tokens' logits cost altogether).
    """
    if device == "cpu":
        return 1024 if trained else 256
    return 4096 if trained else 1024


def chunked_cross_entropy(
    z: Tensor,
    table: Tensor,
    labels: Tensor,
    draws: LabelSampling | None = None,
    *,
    logsumexp: bool = False,
    chunking: Chunking | None = None,
    soft_cap: float | None = None,
) -> CrossEntropyOutput:
    """Cross-entropy (see ``interfaces.CrossEntropy``) with one chunk's logits in memory at a time.
    Raises RuntimeError in a backward pass with create_graph=True.
    """
    uniforms = mask = None
    if draws is not None:
        uniforms, mask = draws.uniforms.flatten(), sampled_tokens(draws, labels)
    if chunking is None:
        chunking = Chunking(default_chunk_size(z.device.type, trained=table.requires_grad))
    chunking = chunking._replace(soft_cap=soft_cap)
    outputs = ChunkedCrossEntropy.apply(
        z.flatten(0, 1), table, labels.flatten(), uniforms, mask, chunking
    )
    total, sampled, log_sum, nll, correct, drawn = (
        t.view_as(labels) if t is not None and t.ndim else t for t in outputs
    )
    return CrossEntropyOutput(total, correct, sampled, log_sum if logsumexp else None, nll, drawn)


def sampled_tokens(draws: LabelSampling, labels: Tensor) -> Tensor | None:
    """The tokens for which labels are sampled, bool [B T], given labels [B, T]; None: all."""
    return None if draws.rows is None else draws.rows[:, None].expand_as(labels).flatten()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy whose gradient is computed in the forward pass, chunk by chunk, while a chunk's
    logits exist.

    With p the softmax of a token's logits, E the table, y a label and y' a sampled one, all
    gradients come from one product per token: d total / d z = p E - E[y] =: g, d sampled / d z =
    g + E[y] - E[y'], d logsumexp / d z = g + E[y]. The table's gradient takes one product more,
    (p - onehot)^T z; where other gradients need another sum of p, logits are recomputed in the
    backward pass. Logits are computed in z's dtype, softmax and sums in float32 or wider.

    With capped logits, c the cap's derivative at each logit: p stands for c p, and E[y] for
    c_y E[y] (``TokenScores.label_slope``).
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        table: Tensor,
        labels: Tensor,
        uniforms: Tensor | None,
        mask: Tensor | None,
        chunking: Chunking,
    ) -> tuple[Any, ...]:
        """Z [N, d_vocab], table [V, d_vocab], labels [N], uniforms [N] in [0, 1), mask of tokens
        to sample for, bool [N] -> total [], sampled [], logsumexp [N], nll [N], correct [],
        drawn [N].
        """
        wants_z, wants_table = ctx.needs_input_grad[:2]
        scores = TokenScores.allocate(
            z, with_samples=uniforms is not None, capped=chunking.soft_cap is not None
        )
        dz, dtable = score_tokens(
            z, table, labels, uniforms, scores, chunking, (wants_z, wants_table)
        )
        saved_z = z if wants_table else None
        slopes = scores.label_slope, scores.drawn_slope
        ctx.save_for_backward(dz, dtable, saved_z, table, labels, scores.drawn, mask, *slopes)
        ctx.chunking = chunking
        correct = scores.correct.sum()
        constants = [scores.nll, correct] + ([] if scores.drawn is None else [scores.drawn])
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        sampled = scores.sampled
        if sampled is not None:
            sampled = (sampled if mask is None else sampled * mask).sum()
        return scores.nll.sum(), sampled, scores.logsumexp, scores.nll, correct, scores.drawn

    @staticmethod
    def backward(
        ctx: Any, total: Tensor | None, sampled: Tensor | None, logsumexp: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        """Combine the gradients of the forward pass, given those of its outputs."""
        # once_differentiable would not notice create_graph=True: the incoming gradient is constant
        if torch.is_grad_enabled():
            raise RuntimeError("the chunked cross-entropy has no second derivative; take `dense`")
        dz, dtable, z, table, labels, drawn, mask, label_slope, drawn_slope = ctx.saved_tensors
        if sampled is None and logsumexp is None:
            assert total is not None, "at least one output has a gradient"
            dz = None if dz is None else dz * total.to(dz.dtype)
            dtable = None if dtable is None else scale_table_gradient(dtable, table, total)
            return dz, dtable, None, None, None, None
        kept = labels != IGNORE
        label = labels.where(kept, 0)
        of_sampled, extra = token_factors(sampled, logsumexp, kept, mask)
        of_label = extra if label_slope is None else extra * label_slope
        of_drawn = of_sampled if drawn_slope is None else of_sampled * drawn_slope
        total = extra.new_zeros(()) if total is None else total
        if dz is not None:
            dz = dz * (total + extra)[:, None].to(dz.dtype)
            add_rows(dz, table, label, of_label)
            if drawn is not None:
                add_rows(dz, table, drawn, -of_drawn)
        if dtable is not None:
            if logsumexp is None and mask is None and sampled is not None:
                # one factor for all tokens: the forward pass's sum of p^T z can be scaled
                dtable = scale_table_gradient(dtable, table, total + sampled)
                add_to_rows(dtable, label, z, of_label)
            else:
                dtable = scale_table_gradient(dtable, table, total)
                add_products(dtable, z, table, extra, ctx.chunking)
            if drawn is not None:
                add_to_rows(dtable, drawn, z, -of_drawn)
        return dz, dtable, None, None, None, None


def token_factors(
    sampled: Tensor | None, logsumexp: Tensor | None, kept: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return d loss / d sampled nll of each token [N], and the factor of its p E beside that of
    ``total`` [N], given the gradients sampled [] and logsumexp [N].
    """
    of_sampled = torch.zeros_like(kept, dtype=torch.float32)
    if sampled is not None:
        of_sampled = sampled * (kept if mask is None else kept & mask)
    return of_sampled, of_sampled if logsumexp is None else of_sampled + logsumexp * kept


def score_tokens(
    z: Tensor,
    table: Tensor,
    labels: Tensor,
    uniforms: Tensor | None,
    scores: TokenScores,
    chunking: Chunking,
    wants: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Fill in ``scores`` chunk by chunk; return the gradients of the total nll by z and by the
    table, None where ``wants`` says they are not needed.
    """
    wants_z, wants_table = wants
    weight = table.to(z.dtype)  # one cast, not one a chunk
    dz = torch.empty_like(z) if wants_z else None
    dtable = None
    score = chunking.epilogue or score_chunk
    for rows in split_range(len(z), chunking.size):
        logits = z[rows] @ weight.T  # [chunk, V]
        chunk_uniforms = None if uniforms is None else uniforms[rows]
        gradient = wants_z or wants_table
        chunk_scores = scores.rows(rows)
        score(logits, labels[rows], chunk_uniforms, chunk_scores, gradient, chunking.soft_cap)
        if dz is not None:
            torch.mm(logits, weight, out=dz[rows])
        if wants_table:
            product = logits.T @ z[rows]  # [V, d_vocab]
            # a single chunk's stays narrow; it is cast where it is scaled
            dtable = product if dtable is None else dtable.to(table.dtype).add_(product)
    return dz, dtable


def scale_table_gradient(dtable: Tensor, table: Tensor, factor: Tensor) -> Tensor:
    """A copy of a gradient in the table's dtype, times a factor []."""
    if dtable.dtype == table.dtype:
        return dtable * factor
    return dtable.to(table.dtype).mul_(factor)


def add_rows(total: Tensor, table: Tensor, ids: Tensor, factors: Tensor) -> None:
    """Add the table's rows of ids [N], times factors [N], to total [N, d_vocab]."""
    total.addcmul_(table[ids].to(total.dtype), factors[:, None].to(total.dtype))


def add_to_rows(total: Tensor, ids: Tensor, z: Tensor, factors: Tensor) -> None:
    """Add z [N, d_vocab], times factors [N], to the rows ids [N] of total [V, d_vocab]; in a fixed
    order on any device.
    """
    total.index_put_((ids,), z.to(total.dtype) * factors[:, None].to(total.dtype), accumulate=True)


def add_products(
    total: Tensor, z: Tensor, table: Tensor, factors: Tensor, chunking: Chunking
) -> None:
    """Add p^T z to total [V, d_vocab], p the softmax of each token's logits (times the cap's
    derivative) times factors [N].
    """
    weight, soft_cap = table.to(z.dtype), chunking.soft_cap
    for rows in split_range(len(z), chunking.size):
        logits = z[rows] @ weight.T  # [chunk, V]
        for tile in row_tiles(logits):
            wide = logits[tile].to(factors.dtype)
            if soft_cap is None:
                p = wide.softmax(-1)
            else:
                wide = cap_logits(wide, soft_cap)
                p = wide.softmax(-1).mul_(cap_slope(wide, soft_cap))
            logits[tile] = p.mul_(factors[rows][tile, None])
        total += logits.T @ z[rows]


def dense_cross_entropy(
    z: Tensor,
    table: Tensor,
    labels: Tensor,
    draws: LabelSampling | None = None,
    *,
    logsumexp: bool = False,
    soft_cap: float | None = None,
) -> CrossEntropyOutput:
    """Cross-entropy (see ``interfaces.CrossEntropy``) by torch's own operations: has a second
    derivative; all logits are in memory, more than once.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    logits = nn.functional.linear(z, table.to(z.dtype)).to(wide).flatten(0, 1)  # [N, V]
    if soft_cap is not None:
        logits = cap_logits(logits, soft_cap)
    kept = (labels != IGNORE).flatten()

    def nll(ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, ids, ignore_index=IGNORE, reduction="none")

    own, sampled, drawn = nll(labels.flatten()), None, None
    if draws is not None:
        drawn = sample_labels(logits.detach().softmax(-1), draws.uniforms.flatten())
        mask = sampled_tokens(draws, labels)
        counted = kept if mask is None else kept & mask
        sampled = nll(drawn.masked_fill(~counted, IGNORE)).sum()
        drawn = drawn.view_as(labels)
    correct = (logits.argmax(-1) == labels.flatten()).sum()
    log_sum = (logits.logsumexp(-1) * kept).view_as(labels) if logsumexp else None
    return CrossEntropyOutput(
        own.sum(), correct, sampled, log_sum, own.detach().view_as(labels), drawn
    )
