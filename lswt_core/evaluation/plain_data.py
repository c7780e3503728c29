"""Measures of a model on one text, as plain data, with the sizes that are chosen for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lswt_core.decode.load_run import LoadedModel
from lswt_core.evaluation.attention_sinks import attention_sinks
from lswt_core.evaluation.effective_context import (
    choose_contexts,
    measure_context,
    relative_lengths,
)
from lswt_core.evaluation.extrapolation import extrapolation
from lswt_core.evaluation.intervals import mean_over_tokens
from lswt_core.evaluation.key_tokens import key_tokens
from lswt_core.evaluation.memory_gain import (
    choose_lengths,
    memory_gain,
    position_buckets,
    require_memory,
)
from lswt_core.evaluation.narrow_states import narrow_errors
from lswt_core.evaluation.recall import recall_by_distance
from lswt_core.evaluation.register_gain import register_gain
from lswt_core.evaluation.repetition import measure_repetition
from lswt_core.evaluation.segment_dependence import segment_dependence
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import TokenLosses, forget, token_losses

FACTORS, WINDOWS = (1, 2, 4, 8, 16), 16  # of the trained segment; of each length
PROMPT, CONTINUATION, CONTINUATIONS = 32, 128, 16


def describe_losses(losses: TokenLosses, text: Text) -> dict[str, Any]:
    """Return mean losses, and losses by tokens since the document's start."""
    mean = mean_over_tokens(losses.nll, losses.document)
    buckets = position_buckets(losses.position)
    by_position = []
    for bucket in np.unique(buckets):
        chosen = buckets == bucket
        one = mean_over_tokens(losses.nll[chosen], losses.document[chosen])
        by_position.append({"from": int(bucket), **one._asdict()})
    return {
        "loss": mean._asdict(),
        "perplexity": math.exp(min(mean.value, 700.0)),
        "bits_per_byte": bits_per_byte(losses, text.n_bytes),
        "by_position": by_position,
    }


def bits_per_byte(losses: TokenLosses, n_bytes: int) -> float | None:
    """Return the bits that a byte of the scored tokens takes; None if they stand for none."""
    return float(losses.nll.sum()) / math.log(2) / n_bytes if n_bytes else None


def describe_memory(
    model: LoadedModel, text: Text, seq_len: int, lengths: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Return the memory's gain by its length (None: chosen for the model)."""
    if lengths is None:
        lengths = choose_lengths(model, text, seq_len)
    points = memory_gain(model, text, seq_len, [length for length in lengths if length > 0])
    return [describe_point(point) for point in points]


def describe_point(point: Any) -> dict[str, Any]:
    """Return one point of the memory's gain curve."""
    return {
        "memory": point.memory,
        "loss": point.loss._asdict(),
        "gain": point.gain._asdict(),
        "by_position": [{"from": at, **gain._asdict()} for at, gain in point.by_position],
    }


def describe_context(
    model: LoadedModel,
    text: Text,
    contexts: Sequence[int] | None,
    others: Mapping[str, LoadedModel],
) -> dict[str, Any]:
    """Return the model's losses by context (None: chosen for the group), its RECL, and that of the
    others of its group.
    """
    if contexts is None:
        contexts = choose_contexts([model, *others.values()], text)
    context = measure_context(model, text, contexts)
    group = [context.losses] + [
        measure_context(other, text, context.contexts).losses for other in others.values()
    ]
    lengths = relative_lengths(context.contexts, group)
    own, *theirs = [{str(share): length for share, length in one.items()} for one in lengths]
    points = zip(context.contexts, context.means(), context.over_longest(), strict=True)
    return {
        "recl": own,
        # a RECL of so many tokens is a lower bound
        "longest_context": context.contexts[-1],
        "recl_of_others": dict(zip(others, theirs, strict=True)),
        "targets": len(context.targets.document),
        "losses": [
            {"context": length, **loss._asdict(), "over_longest": gap._asdict()}
            for length, loss, gap in points
        ],
    }


def describe_extrapolation(model: LoadedModel, text: Text) -> dict[str, Any]:
    """Return losses by multiples of the trained segment."""
    measured = extrapolation(model, text, FACTORS, WINDOWS)
    points = []
    for point in measured.points:
        streamed, recomputed = point.streamed._asdict(), point.recomputed._asdict()
        points.append({"context": point.context, "streamed": streamed, "recomputed": recomputed})
    return {**measured._asdict(), "points": points}


def describe_key_tokens(
    model: LoadedModel, text: Text, losses: TokenLosses, seq_len: int
) -> dict[str, Any]:
    """Return LongPPL. Raises UsageError if no scored token has a memory."""
    require_memory(model, text, seq_len)
    return key_tokens(losses, token_losses(model, text, seq_len, forget), seq_len)._asdict()


def describe_narrow_memory(
    model: LoadedModel, text: Text, losses: TokenLosses, seq_len: int
) -> list[dict[str, Any]]:
    """Return the cost of narrow KV caches."""
    return [
        {"dtype": one.dtype, "increase": one.increase._asdict(), "largest": one.largest}
        for one in narrow_errors(model, text, seq_len, losses)
    ]


def describe_sinks(model: LoadedModel, ids: Tensor) -> dict[str, Any]:
    """Return attention to every kind of sink."""
    return {name: sinks._asdict() for name, sinks in attention_sinks(model, ids).items()}


def describe_registers(
    model: LoadedModel, text: Text, losses: TokenLosses, seq_len: int
) -> dict[str, Any]:
    """Return what registers are worth. Raises UsageError if the model has none."""
    return register_gain(model, text, losses, seq_len)._asdict()


def describe_segments(
    model: LoadedModel, text: Text, losses: TokenLosses, seq_len: int
) -> dict[str, Any]:
    """Return how much losses depend on the segments that a text is read in. Raises UsageError as
    ``segment_dependence``.
    """
    return segment_dependence(model, text, losses, seq_len)._asdict()


def describe_recall(model: LoadedModel, text: Text) -> list[dict[str, Any]]:
    """Return the accuracy of answers by distance."""
    return [
        {"distance": point.distance, "accuracy": point.accuracy._asdict()}
        for point in recall_by_distance(model, text)
    ]


def describe_repetition(model: LoadedModel, text: Text) -> dict[str, Any]:
    """Return the repetition of greedy continuations."""
    measured = measure_repetition(
        model, text, prompt=PROMPT, tokens=CONTINUATION, continuations=CONTINUATIONS
    )
    repeated = {str(n): share for n, share in measured.repeated.items()}
    return {**measured._asdict(), "repeated": repeated}
