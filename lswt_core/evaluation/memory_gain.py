"""What the memory is worth: the loss with the memory cut, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.intervals import Mean, mean_over_tokens
from lswt_core.evaluation.memory_length import (
    can_be_cut,
    longest_memory,
    memory_length,
)
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import TokenLosses, forget, token_losses
from lswt_core.plugin_api.pytree import detach_state
from lswt_core.reporting.units import format_count


class MemoryPoint(NamedTuple):
    """The loss with memories of one length."""

    memory: int | None  # tokens; None: everything that the layers' states keep
    loss: Mean
    gain: Mean  # loss without memory less this one, over tokens behind their document's 1st segment
    # the same by position in the segment: first position of a bucket, gain
    by_position: list[tuple[int, Mean]]


def memory_gain(
    model: LoadedModel, text: Text, seq_len: int, lengths: Sequence[int]
) -> list[MemoryPoint]:
    """Return the losses without memory, with memories of ``lengths`` tokens, and as trained.

    Raises UsageError if the model keeps nothing between segments, its state cannot be cut to a
    number of tokens, or no document is long enough.
    """
    require_memory(model, text, seq_len, lengths)
    without = token_losses(model, text, seq_len, forget)
    points = [describe(0, without, without, seq_len)]
    for length in (*lengths, None):
        context: Any = nullcontext()
        if length is not None:
            context = memory_length(model.decoder, length)
        with context:
            losses = token_losses(model, text, seq_len, detach_state)
        points.append(describe(length, losses, without, seq_len))
    return points


def choose_lengths(model: LoadedModel, text: Text, seq_len: int) -> list[int]:
    """Return memory lengths: powers of two from an eighth of a segment, up to twice what the
    memories hold, as far as the text allows; none where states cannot be cut.
    """
    if not can_be_cut(model.decoder):
        return []
    lengths, length = list[int](), max(1, seq_len // 8)
    most = min(2 * longest_memory(model.decoder), text.longest - seq_len)
    while length <= most:
        lengths.append(length)
        length *= 2
    return lengths


def describe(
    length: int | None, losses: TokenLosses, without: TokenLosses, seq_len: int
) -> MemoryPoint:
    """Return one point of the gain curve."""
    gain, behind = without.nll - losses.nll, losses.position >= seq_len
    buckets = position_buckets(losses.position % seq_len)
    by_position = []
    for bucket in np.unique(buckets[behind]):
        chosen = behind & (buckets == bucket)
        by_position.append((int(bucket), mean_over_tokens(gain[chosen], losses.document[chosen])))
    return MemoryPoint(
        length,
        mean_over_tokens(losses.nll, losses.document),
        mean_over_tokens(gain[behind], losses.document[behind]),
        by_position,
    )


def position_buckets(positions: np.ndarray) -> np.ndarray:
    """Return the lower edge of each position's bucket: 0, 1, 2, 4, 8, ..."""
    powers = np.floor(np.log2(np.maximum(positions, 1))).astype(np.int64)
    return np.where(positions == 0, 0, 2**powers)


def require_memory(
    model: LoadedModel, text: Text, seq_len: int, lengths: Sequence[int] = ()
) -> None:
    """Raise UsageError if memories cannot be measured, or not with these lengths."""
    if not model.decoder.can_read_on:
        raise UsageError(
            "no layer of this model keeps anything between segments\n"
            "  fix: name a model with memory.xl or a recurrent mixer"
        )
    if lengths and not can_be_cut(model.decoder):
        raise UsageError(
            "some layer of this model keeps a state that cannot be cut to a number of tokens: one"
            " that summarises all of the past, or a window\n  fix: --memory 0, which compares with"
            " no memory"
        )
    allowed = text.longest - seq_len
    cure = "--text with longer documents"
    if text.whole.longest > max(len(ids) for ids in text.documents):
        cure = f"a larger --tokens: there is a document of {text.whole.longest:,}"
    if allowed < 1:
        raise UsageError(
            f"no scored token that was read of {text.name!r} is behind its document's first segment"
            f" ({seq_len:,} tokens)\n  fix: a smaller --seq-len, or {cure}"
        )
    longest = max(lengths, default=0)
    if longest > allowed:
        raise UsageError(
            f"no scored token that was read of {text.name!r} has {format_count(longest, 'token')}"
            f" before its segment ({seq_len:,} tokens)\n  fix: memories of at most {allowed:,}"
            f" tokens, a smaller --seq-len, or {cure}"
        )
