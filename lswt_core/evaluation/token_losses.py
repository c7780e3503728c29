"""The loss of every token of a text, read document by document as a model is trained: in segments,
with the memory states carried along, from an empty memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lswt_core.decode.load_run import LoadedModel
from lswt_core.evaluation.texts import Text
from lswt_core.interfaces import IGNORE
from lswt_core.plugin_api.pytree import detach_state, tree_map

ROWS = 16  # documents that are read at once

# what is left of a decoder's state between two segments
Carry = Callable[[Any], Any]


class TokenLosses(NamedTuple):
    """Losses of a text's scored tokens, one document after the other."""

    nll: np.ndarray  # [tokens] in nats
    document: np.ndarray  # [tokens] index
    # [tokens] how many tokens of the document precede the token that is predicted, BOS included,
    # less one: the index of the token it is predicted from
    position: np.ndarray

    @property
    def mean(self) -> float:
        """The loss in nats per token."""
        return float(self.nll.mean())


def forget(state: Any) -> None:
    """A carry that keeps nothing."""


@torch.no_grad()
def token_losses(
    model: LoadedModel, text: Text, seq_len: int, carry: Carry = detach_state
) -> TokenLosses:
    """Return the loss of every token of a text, read in segments of ``seq_len`` tokens; ``carry``
    maps the state that a segment leaves to the one that the next segment gets.
    """
    lengths = np.array([len(ids) for ids in text.documents])
    # padding further than in training would be work for nothing
    seq_len = min(seq_len, max(model.seq_len, int(lengths.max())))
    losses = [np.zeros(length) for length in lengths]
    longest_first = np.argsort(-lengths, kind="stable")
    for begin in range(0, len(lengths), ROWS):
        rows = longest_first[begin : begin + ROWS]
        for at, nll in read_rows(model, text, rows, seq_len, carry):
            for row, values in zip(rows, nll, strict=False):
                left = int(lengths[row]) - at
                losses[row][at : at + seq_len] = values[:left]
    scored = np.concatenate(text.labels) != IGNORE
    return TokenLosses(
        np.concatenate(losses)[scored],
        np.repeat(np.arange(len(lengths)), lengths)[scored],
        np.concatenate([np.arange(length) for length in lengths])[scored],
    )


def read_rows(
    model: LoadedModel, text: Text, rows: np.ndarray, seq_len: int, carry: Carry
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield, segment by segment, its first position and the losses [B, seq_len] of the documents
    that reach it. ``rows`` are documents, longest first; each is padded to whole segments.
    """
    state, device = None, next(model.decoder.parameters()).device
    for at, inputs, labels in segments_of(text, rows, seq_len):
        alive = len(inputs)
        state = tree_map(lambda tensor, alive=alive: tensor[:alive], state)  # type: ignore[misc]
        nll, state = score(model, inputs.to(device), labels.to(device), state)
        state = carry(state)
        yield at, nll.double().cpu().numpy()


def segments_of(text: Text, rows: np.ndarray, seq_len: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield every segment's first position, inputs and labels [B, seq_len] of the documents that
    reach it. ``rows`` are documents, longest first; each is padded to whole segments.
    """
    lengths = [len(text.documents[row]) for row in rows]
    for at in range(0, lengths[0], seq_len):
        alive = sum(length > at for length in lengths)
        inputs = np.full((alive, seq_len), text.eos_id)
        labels = np.full((alive, seq_len), IGNORE)
        for i, row in enumerate(rows[:alive]):
            ids = text.documents[row][at : at + seq_len]
            inputs[i, : len(ids)] = ids
            labels[i, : len(ids)] = text.labels[row][at : at + seq_len]
        yield at, torch.from_numpy(inputs), torch.from_numpy(labels)


def score(
    model: LoadedModel, inputs: Tensor, labels: Tensor, state: Any = None
) -> tuple[Tensor, Any]:
    """Return the losses [B, T] of labels [B, T] (0 at IGNORE), and the next state."""
    with model.precision.autocast(inputs.device):
        states, state = model.decoder(inputs, state)
        nll = model.decoder.vocabulary.score(states, labels).nll
    assert nll is not None
    return nll, state
