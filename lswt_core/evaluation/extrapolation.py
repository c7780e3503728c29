"""Whether positions extrapolate: losses of the same tokens with contexts of several times the
trained segment, streamed in segments and recomputed in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from lswt_core.decode.load_run import LoadedModel
from lswt_core.errors import UsageError
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
    scored: int  # tokens at the end of every window, of which those with a label count
    windows: int
    longest: int  # tokens of the longest document: no window is longer


def extrapolation(
    model: LoadedModel, text: Text, factors: Sequence[int], windows: int
) -> Extrapolation:
    """Return the losses of the last half segment of some windows, read with contexts of ``factors``
    times the trained segment (increasing), as far as documents are long enough.

    All lengths score the same tokens: windows end where the longest ones do. Raises UsageError if
    fewer than two lengths can be compared.
    """
    scored = max(1, model.seq_len // 2)
    lengths = [factor * model.seq_len for factor in factors]
    while lengths and not choose_ends(text, lengths[-1], scored, windows):
        lengths.pop()
    if len(lengths) < 2:
        raise UsageError(
            f"no scored token of {text.name!r} has two segments ({2 * model.seq_len:,} tokens) of"
            " its document before it\n  fix: --text with longer documents"
        )
    ends = choose_ends(text, lengths[-1], scored, windows)
    kept = np.concatenate([text.labels[at][end - scored : end] for at, end in ends]) != IGNORE
    documents = np.repeat([document for document, _ in ends], scored)[kept]
    points = []
    for length in lengths:
        streamed = window_losses(model, text, ends, (length, model.seq_len, scored))[kept]
        recomputed = window_losses(model, text, ends, (length, length, scored))[kept]
        points.append(
            LengthPoint(
                length,
                mean_over_tokens(streamed, documents),
                mean_over_tokens(recomputed, documents),
            )
        )
    longest = max(len(ids) for ids in text.documents)
    return Extrapolation(points, scored, len(ends), longest)


def choose_ends(text: Text, length: int, scored: int, windows: int) -> list[tuple[int, int]]:
    """Return document and end of windows of ``length`` tokens that do not overlap: one a document
    first, then a second one of each, and so on. Some of the last ``scored`` tokens of each count.
    """
    ends = [
        (number, document, end)
        for document, labels in enumerate(text.labels)
        for number, end in enumerate(window_ends(labels != IGNORE, length, scored))
    ]
    return [(document, end) for _, document, end in sorted(ends)[:windows]]


def window_ends(counts: np.ndarray, length: int, scored: int) -> Iterator[int]:
    """Yield the ends of windows of a document whose tokens ``counts`` [tokens] are scored. Each
    ends as early as most of its last ``scored`` tokens count: where all do, windows adjoin.
    """
    before = np.append(0, np.cumsum(counts))
    within = before[scored:] - before[:-scored]  # of the ``scored`` tokens from each position on
    start = 0
    while start + length <= len(counts):
        first = start + length - scored
        ahead = within[first : first + length]
        best = int(ahead.argmax())
        start += length + (best if ahead[best] else 0)
        if ahead[best]:
            yield start


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
