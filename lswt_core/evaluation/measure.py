"""All measures of a model on one text, as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.activations import measure_activations
from lswt_core.evaluation.attention_sinks import attention_sinks
from lswt_core.evaluation.effective_context import (
    ContextLosses,
    context_losses,
    relative_lengths,
)
from lswt_core.evaluation.extrapolation import extrapolation
from lswt_core.evaluation.intervals import Mean, mean_over_tokens
from lswt_core.evaluation.key_tokens import key_tokens
from lswt_core.evaluation.memory_gain import memory_gain, position_buckets
from lswt_core.evaluation.narrow_states import narrow_errors
from lswt_core.evaluation.recall import recall_by_distance
from lswt_core.evaluation.repetition import measure_repetition
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import TokenLosses, forget, token_losses

FACTORS = (1, 2, 4, 8, 16)  # of the trained segment
CONTEXT_STEP, LONGEST_CONTEXT = 0.25, 4  # of the trained segment
TARGETS, WINDOWS = 256, 16
# times the tokens of the text that cold restarts may read
COLD_BUDGET = 16
PROBED_ROWS, PROBED_TOKENS = 8, 512  # whose attention weights are in memory at once
PROMPT, CONTINUATION, CONTINUATIONS = 32, 128, 16


class Asked(NamedTuple):
    """What is measured where the text and the model allow more than one thing."""

    seq_len: int  # of the segments that texts are read in
    memory: Sequence[int] | None = None  # lengths in tokens; None: chosen for the model
    contexts: Sequence[int] | None = None  # of RECL; None: chosen for the model
    others: Mapping[str, LoadedModel] = {}  # that RECL is compared with, by name


def evaluate_text(model: LoadedModel, text: Text, asked: Asked) -> dict[str, Any]:
    """Return every measure that the model and the text allow; "left_out" says which are missing,
    and why.

    "loss" (nats per token, 95 % interval over documents), "perplexity", "bits_per_byte",
    "by_position" (tokens since the document's start), "memory" (gain by memory length),
    "effective_context" (RECL), "extrapolation", "key_tokens", "narrow_memory", "sinks",
    "activations", "repetition", "recall" (accuracy by distance in segments). Raises
    UsageError if a length that was asked for is not possible.
    """
    left_out: dict[str, str] = {}

    def unless_impossible(name: str, asked_for: Any, measure: Callable[[], Any]) -> Any:
        """Return a measure; None if it is not possible, and then ``left_out`` says why."""
        try:
            return measure()
        except UsageError as error:
            if asked_for is not None:
                raise
            left_out[name] = str(error).partition("\n")[0]
            return None

    losses = token_losses(model, text, asked.seq_len)
    lengths = asked.memory if asked.memory is not None else choose_lengths(model, text, asked)
    ids = probe_batch(model, text)
    memory = unless_impossible(
        "memory",
        asked.memory,
        lambda: memory_gain(model, text, asked.seq_len, [m for m in lengths if m > 0]),
    )
    context = unless_impossible(
        "effective_context", asked.contexts, lambda: describe_context(model, text, asked)
    )
    return {
        "documents": len(text.documents),
        "tokens": text.tokens,
        **describe_losses(losses, text),
        "memory": memory and [describe_point(point) for point in memory],
        "effective_context": context,
        "extrapolation": describe_extrapolation(model, text),
        "key_tokens": describe_key_tokens(model, text, losses, asked.seq_len),
        "narrow_memory": [
            {"dtype": one.dtype, "increase": one.increase._asdict(), "largest": one.largest}
            for one in narrow_errors(model, text, asked.seq_len, losses)
        ],
        "sinks": {name: sinks._asdict() for name, sinks in attention_sinks(model, ids).items()},
        "activations": measure_activations(model, ids)._asdict(),
        "recall": [
            {"distance": point.distance, "accuracy": point.accuracy._asdict()}
            for point in recall_by_distance(model, text)
        ],
        "repetition": describe_repetition(model, text),
        "left_out": left_out,
    }


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
        "bits_per_byte": mean.value / math.log(2) / text.bytes_per_token,
        "by_position": by_position,
    }


def choose_lengths(model: LoadedModel, text: Text, asked: Asked) -> list[int]:
    """Return memory lengths: powers of two from an eighth of a segment, up to twice what the
    memories hold, as far as the text allows; none where states cannot be cut.
    """
    from lswt_core.evaluation.token_losses import cuttable_memories

    memories = cuttable_memories(model.decoder)
    if not memories:
        return []
    allowed = max(len(ids) for ids in text.documents) - asked.seq_len
    most = min(2 * max(memory.length for memory in memories), allowed)
    lengths, length = [], max(1, asked.seq_len // 8)
    while length <= most:
        lengths.append(length)
        length *= 2
    return lengths


def describe_point(point: Any) -> dict[str, Any]:
    """Return one point of the memory's gain curve."""
    return {
        "memory": point.memory,
        "loss": point.loss._asdict(),
        "gain": point.gain._asdict(),
        "by_position": [{"from": at, **gain._asdict()} for at, gain in point.by_position],
    }


def measure_context(
    model: LoadedModel, text: Text, contexts: Sequence[int] | None = None
) -> ContextLosses:
    """Return the losses by context (None: chosen for the model), of as many targets as the budget
    allows.
    """
    if contexts is None:
        step = max(1, int(CONTEXT_STEP * model.seq_len))
        longest = max(len(ids) for ids in text.documents)
        most = min(LONGEST_CONTEXT * model.seq_len, longest)
        contexts = range(step, most + 1, step)
        if len(contexts) < 2:
            raise UsageError(f"no document of {text.name!r} is longer than {2 * step:,} tokens")
    targets = min(TARGETS, max(16, COLD_BUDGET * text.tokens // sum(contexts)))
    return context_losses(model, text, contexts, targets)


def describe_context(model: LoadedModel, text: Text, asked: Asked) -> dict[str, Any]:
    """Return the model's losses by context, its RECL, and that of the others of its group."""
    context = measure_context(model, text, asked.contexts)
    group = [context.losses] + [
        measure_context(other, text, context.contexts).losses for other in asked.others.values()
    ]
    lengths = relative_lengths(context.contexts, group)
    own, *others = [{str(share): length for share, length in one.items()} for one in lengths]
    points = zip(context.contexts, context.means(), strict=True)
    return {
        "recl": own,
        "recl_of_others": dict(zip(asked.others, others, strict=True)),
        "targets": len(context.targets.document),
        "losses": [{"context": length, **loss._asdict()} for length, loss in points],
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
) -> dict[str, Any] | None:
    """Return LongPPL; None if no document is longer than a segment, or nothing is remembered."""
    if not model.decoder.can_read_on or not (losses.position >= seq_len).any():
        return None
    return key_tokens(losses, token_losses(model, text, seq_len, forget), seq_len)._asdict()


def describe_repetition(model: LoadedModel, text: Text) -> dict[str, Any] | None:
    """Return the repetition of greedy continuations."""
    measured = measure_repetition(
        model, text, prompt=PROMPT, tokens=CONTINUATION, continuations=CONTINUATIONS
    )
    if measured is None:
        return None
    repeated = {str(n): share for n, share in measured.repeated.items()}
    return {**measured._asdict(), "repeated": repeated}


def probe_batch(model: LoadedModel, text: Text) -> Tensor:
    """Return the beginnings of documents [B, T], all as long as the shortest of them."""
    longest = sorted(text.documents, key=len, reverse=True)[:PROBED_ROWS]
    size = min(PROBED_TOKENS, model.seq_len, len(longest[-1]))
    device = next(model.decoder.parameters()).device
    return torch.from_numpy(np.stack([ids[:size] for ids in longest])).to(device)


def read_mean(entry: dict[str, Any]) -> Mean:
    """Return a mean that was turned into plain data."""
    return Mean(entry["value"], entry["interval"], entry["tokens"])
