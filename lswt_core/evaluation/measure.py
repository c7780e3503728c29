"""All measures of a model on one text, as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.activations import measure_activations
from lswt_core.evaluation.plain_data import (
    describe_context,
    describe_extrapolation,
    describe_key_tokens,
    describe_losses,
    describe_memory,
    describe_narrow_memory,
    describe_recall,
    describe_registers,
    describe_repetition,
    describe_segments,
    describe_sinks,
)
from lswt_core.evaluation.probe_batch import probe_batch
from lswt_core.evaluation.recall import chance_level
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import TokenLosses, token_losses


class Asked(NamedTuple):
    """What is measured where the text and the model allow more than one thing."""

    seq_len: int  # of the segments that texts are read in
    memory: Sequence[int] | None = None  # lengths in tokens; None: chosen for the model
    contexts: Sequence[int] | None = None  # of RECL; None: chosen for the model
    others: Mapping[str, LoadedModel] = {}  # that RECL is compared with, by name

    def options(self) -> dict[str, str]:
        """The options of the command whose values were given, by measure."""
        given = {"memory": self.memory, "effective_context": self.contexts}
        names = {"memory": "--memory", "effective_context": "--context"}
        return {measure: names[measure] for measure, one in given.items() if one is not None}


class Measures:
    """Measures of one text; what is not possible is None, and ``left_out`` says why."""

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}

    def measure(self, name: str, how: Callable[[], Any], option: str | None = None) -> Any:
        """Return a measure, or None if it is not possible. Raises UsageError if the values of an
        ``option`` are not.
        """
        try:
            return how()
        except UsageError as error:
            if option is not None:
                raise UsageError(f"{option}: {error}") from error
            self.left_out[name] = str(error).partition("\n")[0]
            return None


def evaluate_text(model: LoadedModel, text: Text, asked: Asked) -> dict[str, Any]:
    """Return every measure that the model and the text allow; the others are None, and "left_out"
    says why.

    "documents" and "tokens_read" of the "whole" text, "tokens" (scored ones of these),
    "loss" (nats per token, 95 % interval over documents), "perplexity", "bits_per_byte",
    "by_position" (tokens since the document's start), "memory" (gain by memory length),
    "effective_context" (RECL), "extrapolation", "key_tokens", "narrow_memory", "sinks",
    "registers" (what they are worth), "segment_dependence", "activations", "repetition",
    "recall" (accuracy by distance in segments), "recall_chance", "probed" (first tokens of
    documents, for sinks and activations). Raises UsageError if a length that was asked for is
    not possible.
    """
    losses, ids = token_losses(model, text, asked.seq_len), probe_batch(model, text)
    measures, options = Measures(), asked.options()
    measured = {
        name: measures.measure(name, how, options.get(name))
        for name, how in measures_of(model, text, asked, losses, ids).items()
    }
    return {
        "documents": len(text.documents),
        "tokens": text.tokens,
        "tokens_read": text.read,
        "whole": text.whole._asdict(),
        **describe_losses(losses, text),
        "probed": {"documents": ids.shape[0], "tokens": ids.shape[1]},
        **measured,
        "recall_chance": measured["recall"] and chance_level(text)._asdict(),
        "left_out": measures.left_out,
    }


def measures_of(
    model: LoadedModel, text: Text, asked: Asked, losses: TokenLosses, ids: Tensor
) -> dict[str, Callable[[], Any]]:
    """Return the measures that not every model and text allows, by name; each raises UsageError if
    it is not possible. ``losses`` are the text's, ``ids`` [B, T] the tokens to probe.
    """
    seq_len = asked.seq_len
    return {
        "memory": lambda: describe_memory(model, text, seq_len, asked.memory),
        "effective_context": lambda: describe_context(model, text, asked.contexts, asked.others),
        "extrapolation": lambda: describe_extrapolation(model, text),
        "key_tokens": lambda: describe_key_tokens(model, text, losses, seq_len),
        "narrow_memory": lambda: describe_narrow_memory(model, text, losses, seq_len),
        "sinks": lambda: describe_sinks(model, ids),
        "registers": lambda: describe_registers(model, text, losses, seq_len),
        "segment_dependence": lambda: describe_segments(model, text, losses, seq_len),
        "activations": lambda: measure_activations(model, ids)._asdict(),
        "recall": lambda: describe_recall(model, text),
        "repetition": lambda: describe_repetition(model, text),
    }
