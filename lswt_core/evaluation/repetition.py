"""Repetition in greedy continuations (Welleck et al. 2020, arXiv 1908.04319; Su et al. 2022, arXiv
2202.06417).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lswt_core.decode import InferenceEngine
from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
from lswt_core.evaluation.texts import Text

NGRAMS = (2, 3, 4)


class Repetition(NamedTuple):
    """Repetition in continuations of a text's documents."""

    repeated: dict[int, float]  # n -> share of n-grams of a continuation that occurred before in it
    diversity: float  # the product of 1 - repeated over n
    continuations: int
    tokens: int  # of each


@torch.no_grad()
def measure_repetition(
    model: LoadedModel, text: Text, *, prompt: int, tokens: int, continuations: int
) -> Repetition:
    """Return the repetition of greedy continuations of ``tokens`` tokens of the first ``prompt``
    tokens of documents. Raises UsageError if no document is as long.
    """
    starts = [ids[:prompt] for ids in text.documents if len(ids) >= prompt][:continuations]
    if not starts:
        raise UsageError(
            f"no document of {text.name!r} has the {prompt:,} tokens that are continued\n"
            "  fix: --text with longer documents"
        )
    device = next(model.decoder.parameters()).device
    engine = InferenceEngine(model.decoder, model.precision, model.seq_len)
    sequence = engine.start()
    ids = torch.stack([torch.from_numpy(start) for start in starts]).to(device)
    generated = []
    for _ in range(tokens):
        ids = engine.logits(sequence(ids)[:, -1]).argmax(-1, keepdim=True)
        generated.append(ids)
    rows = torch.cat(generated, dim=1).tolist()
    repeated = {}
    for n in NGRAMS:
        repeated[n] = sum(repeated_share(row, n) for row in rows) / len(rows)
    diversity = 1.0
    for share in repeated.values():
        diversity *= 1 - share
    return Repetition(repeated, diversity, len(rows), tokens)


def repeated_share(ids: Sequence[int], n: int) -> float:
    """Return which share of a text's n-grams are not its first of their kind."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
