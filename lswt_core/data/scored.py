"""Which tokens are predicted, where a source says that not all are: the answers of a task, the
completion of a prompt.

Ids are stored signed then: a token that is not predicted as ``~id``, the bitwise complement, which
is negative; so is BOS where the end of its document is not predicted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lswt_core.errors import DataError
from lswt_core.interfaces import IGNORE, Document, Tokenizer


class Piece(NamedTuple):
    """Consecutive characters of a document, all of whose tokens are predicted or none."""

    text: str
    is_scored: bool


def pieces_of(document: Document) -> Iterator[Piece]:
    """Yield a document's pieces in order, together its text. Raises DataError if its ranges overlap
    or lie outside of the text.
    """
    if document.scored is None:
        yield Piece(document.text, True)
        return
    at, size = 0, len(document.text)
    for begin, end in document.scored:
        if not at <= begin < end <= size + 1:
            raise DataError(
                f"document {document.id!r} has the range ({begin}, {end}) of scored characters"
                f" after character {at} of {size}: ranges are in order, apart, and end at"
                f" {size + 1} at most"
            )
        if begin > at:
            yield Piece(document.text[at:begin], False)
        if begin < size:
            yield Piece(document.text[begin:end], True)
        at = end
    if at < size:
        yield Piece(document.text[at:], False)


def bos_of(document: Document, bos_id: int) -> int:
    """Return BOS as it is stored: complemented unless the document's end is predicted."""
    if document.scored is None or (document.scored and document.scored[-1][1] > len(document.text)):
        return bos_id
    return ~bos_id


def marked(ids: Iterable[int], is_scored: bool) -> list[int]:
    """Return ids as they are stored."""
    return list(ids) if is_scored else [~id_ for id_ in ids]


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the stored ids of documents, int64, BOS first; none of a document without text."""
    pieces = [list(pieces_of(document)) for document in documents]
    encoded = iter(tokenizer.encode([piece.text for own in pieces for piece in own]))
    stored = []
    for document, own in zip(documents, pieces, strict=True):
        ids = [bos_of(document, tokenizer.bos_id)]
        for piece in own:
            ids += marked(next(encoded), piece.is_scored)
        stored.append(np.array(ids if document.text else [], dtype=np.int64))
    return stored


def plain_ids(stored: np.ndarray) -> np.ndarray:
    """Return stored ids as a model reads them, int64."""
    ids = stored.astype(np.int64)
    return np.where(ids < 0, ~ids, ids)


def as_labels(stored: np.ndarray) -> np.ndarray:
    """Return stored ids as labels, int64: IGNORE where they are not predicted."""
    ids = stored.astype(np.int64)
    return np.where(ids < 0, IGNORE, ids)


def end_labels(bos: np.ndarray, eos_id: int) -> np.ndarray:
    """Return the labels of the ends of documents, from their stored BOS."""
    return np.where(bos.astype(np.int64) < 0, IGNORE, eos_id)
