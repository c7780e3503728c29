"""Measures of memory, positions and attention as single numbers, to compare models by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lswt_core.decode.load_run import LoadedModel
from lswt_core.evaluation.attention_sinks import attention_sinks
from lswt_core.evaluation.extrapolation import extrapolation
from lswt_core.evaluation.measure import (
    FACTORS,
    WINDOWS,
    Asked,
    describe_repetition,
    measure_context,
    probe_batch,
)
from lswt_core.evaluation.memory_gain import memory_gain
from lswt_core.evaluation.recall import recall_by_distance
from lswt_core.evaluation.texts import Text

Probe = Callable[[LoadedModel, Text], dict[str, float]]


def probe_memory(model: LoadedModel, text: Text) -> dict[str, float]:
    """Nats per token that the memory is worth behind a document's first segment; 0 without one."""
    if not model.decoder.can_read_on:
        return {"memory_gain": 0.0}
    return {"memory_gain": memory_gain(model, text, model.seq_len, ())[-1].gain.value}


def probe_context(model: LoadedModel, text: Text) -> dict[str, float]:
    """Relative effective context length in tokens, of all targets and of the hardest tenth."""
    [recl] = measure_context(model, text, Asked(model.seq_len)).recl
    return {f"recl_r{share}": float(length) for share, length in recl.items() if share != 0.5}


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
    """Share of (layer, head) whose mean attention to a sink is above 0.3."""
    sinks = attention_sinks(model, probe_batch(model, text))
    return {f"sink_rate_{name}": one.rate for name, one in sinks.items()}


def probe_repetition(model: LoadedModel, text: Text) -> dict[str, float]:
    """Share of n-grams of greedy continuations that came before in them."""
    measured: Mapping[str, Any] = describe_repetition(model, text) or {"repeated": {}}
    return {f"repeated_{n}_grams": share for n, share in measured["repeated"].items()}


def probe_recall(model: LoadedModel, text: Text) -> dict[str, float]:
    """Accuracy of the answers of recall tasks by distance in segments."""
    return {
        f"recall_at_{point.distance}": point.accuracy.value
        for point in recall_by_distance(model, text)
    }


PROBES: dict[str, Probe] = {
    "memory": probe_memory,
    "context": probe_context,
    "extrapolation": probe_extrapolation,
    "sinks": probe_sinks,
    "repetition": probe_repetition,
    "recall": probe_recall,
}
