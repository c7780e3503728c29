"""Whether positions extrapolate: losses of the same tokens with contexts of several times the
trained segment, streamed in segments and recomputed in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lswt_core.decode.load_run import LoadedModel
from lswt_core.evaluation.intervals import Mean, mean_over_tokens
from lswt_core.evaluation.texts import Text
from lswt_core.evaluation.token_losses import score
from lswt_core.interfaces import IGNORE
from lswt_core.plugin_api.pytree import detach_state


class LengthPoint(NamedTuple):
    """The losses with one length of context."""

    context: int  # tokens of a window, the scored ones included
    streamed: Mean  # segments of the trained length, states carried along from the window's start
    recomputed: Mean  # one pass over the window


class Extrapolation(NamedTuple):
    """Losses by length of context."""

    points: list[LengthPoint]
    scored: int  # tokens at the end of every window
    windows: int
    longest: int  # tokens of the longest document: no window is longer


def extrapolation(
    model: LoadedModel, text: Text, factors: Sequence[int], windows: int
) -> Extrapolation:
    """Return the losses of the last half segment of some windows, read with contexts of ``factors``
    times the trained segment, as far as documents are long enough.

    All lengths score the same tokens: windows end where the longest ones do.
    """
    longest = max(len(ids) for ids in text.documents)
    lengths = [f * model.seq_len for f in factors if f * model.seq_len <= longest]
    scored = max(1, model.seq_len // 2)
    if not lengths:
        return Extrapolation([], scored, 0, longest)
    ends = choose_ends(text, lengths[-1], windows)
    points = []
    for length in lengths:
        streamed = window_losses(model, text, ends, (length, model.seq_len, scored))
        recomputed = window_losses(model, text, ends, (length, length, scored))
        labels = [text.labels[document][end - scored : end] for document, end in ends]
        kept = np.concatenate(labels) != IGNORE
        if not kept.any():
            break
        documents = np.repeat([document for document, _ in ends], scored)[kept]
        points.append(
            LengthPoint(
                length,
                mean_over_tokens(streamed[kept], documents),
                mean_over_tokens(recomputed[kept], documents),
            )
        )
    return Extrapolation(points, scored, len(ends), longest)


def choose_ends(text: Text, length: int, windows: int) -> list[tuple[int, int]]:
    """Return document and end of windows of ``length`` tokens that do not overlap: one a document
    first, then a second one of each, and so on.
    """
    ends = [
        (number, document, (number + 1) * length)
        for document, ids in enumerate(text.documents)
        for number in range(len(ids) // length)
    ]
    return [(document, end) for _, document, end in sorted(ends)[:windows]]


@torch.no_grad()
def window_losses(
    model: LoadedModel, text: Text, ends: Sequence[tuple[int, int]], sizes: tuple[int, int, int]
) -> np.ndarray:
    """Return the losses [windows * scored] of the last tokens of windows: ``sizes`` are those of a
    window, of its segments and of what is scored.
    """
    length, segment, scored = sizes
    device = next(model.decoder.parameters()).device
    losses = []
    for document, end in ends:
        ids = text.documents[document][end - length : end]
        labels = text.labels[document][end - length : end].copy()
        labels[:-scored] = IGNORE
        both = torch.from_numpy(np.stack((ids, labels))).to(device)
        state, parts = None, []
        for part in both.split(segment, dim=1):
            nll, state = score(model, part[:1], part[1:], state)
            state = detach_state(state)
            parts.append(nll[0])
        losses.append(torch.cat(parts)[-scored:].double().cpu().numpy())
    return np.concatenate(losses)
