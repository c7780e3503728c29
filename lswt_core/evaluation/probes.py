"""Measures of memory, positions and attention as single numbers, to compare models by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.attention_sinks import REGISTERS, attention_sinks
from lswt_core.evaluation.effective_context import (
    LONGEST_CONTEXT,
    measure_context,
    relative_lengths,
    spaced_contexts,
)
from lswt_core.evaluation.extrapolation import extrapolation
from lswt_core.evaluation.memory_gain import memory_gain
from lswt_core.evaluation.plain_data import FACTORS, WINDOWS, describe_repetition
from lswt_core.evaluation.probe_batch import probe_batch
from lswt_core.evaluation.recall import recall_by_distance
from lswt_core.evaluation.register_gain import register_gain
from lswt_core.evaluation.segment_dependence import segment_dependence
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import token_losses

Values = dict[str, float]


def each_alone(measured: Sequence[Values]) -> list[Values]:
    """The values of models are what was measured of each."""
    return list(measured)


class Probe(NamedTuple):
    """A measure of models that are compared."""

    measure: Callable[[LoadedModel, Text], dict[str, Any]]  # of one model, as plain data
    # the values of all; raises UsageError if they cannot be compared
    compare: Callable[[Sequence[dict[str, Any]]], list[Values]] = each_alone


def probe_memory(model: LoadedModel, text: Text) -> dict[str, float]:
    """Nats per token that the memory is worth behind a document's first segment; 0 without one."""
    if not model.decoder.can_read_on:
        return {"memory_gain": 0.0}
    return {"memory_gain": memory_gain(model, text, model.seq_len, ())[-1].gain.value}


def probe_context(model: LoadedModel, text: Text) -> dict[str, Any]:
    """Losses by context of the same tokens, and which tokens these are. Contexts are up to four
    segments whatever the memory: arms that differ in it are one group.
    """
    contexts = spaced_contexts(text, model.seq_len, LONGEST_CONTEXT * model.seq_len)
    context = measure_context(model, text, contexts)
    document, position = context.targets
    ids = [int(text.labels[at][where]) for at, where in zip(document, position, strict=True)]
    names = [text.names[at] for at in document]
    return {
        "contexts": list(context.contexts),
        "losses": context.losses.tolist(),
        "targets": sha256(repr((names, position.tolist(), ids)).encode()).hexdigest(),
    }


def compare_contexts(measured: Sequence[dict[str, Any]]) -> list[Values]:
    """Relative effective context length in tokens, in the group of all models, of all targets and
    of the hardest tenth; the longest context is a lower bound.
    """
    if len({(one["targets"], *one["contexts"]) for one in measured}) > 1:
        raise UsageError("these models read different tokens, so that they are no group")
    group = [np.array(one["losses"]) for one in measured]
    return [
        {f"recl_r{share}": float(recl[share]) for share in (0.1, 1.0)}
        for recl in relative_lengths(measured[0]["contexts"], group)
    ]


def probe_extrapolation(model: LoadedModel, text: Text) -> dict[str, float]:
    """Nats per token that the same tokens cost more in longer windows than in one of the trained
    length: read in segments with the memory carried along, and in one pass.
    """
    first, *longer = extrapolation(model, text, FACTORS, WINDOWS).points
    values = {}
    for point in longer:
        factor = point.context // model.seq_len
        values[f"x{factor}_in_segments"] = point.streamed.value - first.streamed.value
        values[f"x{factor}_in_one_pass"] = point.recomputed.value - first.recomputed.value
    return values


def probe_sinks(model: LoadedModel, text: Text) -> dict[str, float]:
    """Share of (layer, head) whose mean attention to a sink is above 0.3. Nats per token that
    registers are worth, 0 for a model without them.
    """
    sinks, gain = attention_sinks(model, probe_batch(model, text)), 0.0
    if REGISTERS in sinks:
        losses = token_losses(model, text, model.seq_len)
        gain = register_gain(model, text, losses, model.seq_len).value
    return {f"sink_rate_{name}": one.rate for name, one in sinks.items()} | {"register_gain": gain}


def probe_segments(model: LoadedModel, text: Text) -> dict[str, float]:
    """Nats by which a token's loss changes where every segment is read in eight pieces."""
    losses = token_losses(model, text, model.seq_len)
    dependence = segment_dependence(model, text, losses, model.seq_len)
    return {"segment_dependence": dependence.value}


def probe_repetition(model: LoadedModel, text: Text) -> dict[str, float]:
    """Share of n-grams of greedy continuations that came before in them."""
    repeated = describe_repetition(model, text)["repeated"]
    return {f"repeated_{n}_grams": share for n, share in repeated.items()}


def probe_recall(model: LoadedModel, text: Text) -> dict[str, float]:
    """Accuracy of the answers of recall tasks by distance in segments."""
    return {
        f"recall_at_{point.distance}": point.accuracy.value
        for point in recall_by_distance(model, text)
    }


PROBES = {
    "memory": Probe(probe_memory),
    "context": Probe(probe_context, compare_contexts),
    "extrapolation": Probe(probe_extrapolation),
    "sinks": Probe(probe_sinks),
    "segments": Probe(probe_segments),
    "repetition": Probe(probe_repetition),
    "recall": Probe(probe_recall),
}
