"""Texts as memory-mapped token ids, tokenised once and kept in a cache file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np

from lswt_core.data.cache_keys import cache_key
from lswt_core.data.scored import bos_of, marked, pieces_of
from lswt_core.data.token_file import FORMAT, TokenFileWriter, Tokens, load_tokens
from lswt_core.errors import DataError, ResourceError
from lswt_core.interfaces import DataSource, Document, Tokenizer
from lswt_core.plugin_api.atomic_write import OTHER_CACHE, open_atomically
from lswt_core.recipe import Chosen

Split = Literal["train", "valid"]
# called with documents and bytes of text so far, and the bytes in all where the source knows
Progress = Callable[[int, int, int | None], None]


class TextPiece(NamedTuple):
    """A document, or a part of a long one."""

    document: Document
    text: str
    is_first: bool
    is_scored: bool


Texts = TypeVar("Texts", Document, TextPiece)


def cache_directory() -> Path:
    """The directory of tokenised texts and trained tokenizers: LSWT_CACHE_DIR, or ~/.cache/lswt."""
    return Path(os.environ.get("LSWT_CACHE_DIR") or "~/.cache/lswt").expanduser()


def report_nothing(documents: int, n_bytes: int, total: int | None) -> None:
    """Report no progress."""


def tokenise(
    source: DataSource,
    tokenizer: Tokenizer,
    split: Split,
    cache: Path,
    progress: Progress = report_nothing,
    made_by: Sequence[Chosen] = (),
) -> Tokens:
    """The tokens of a split, loaded from the cache or tokenised into it.

    The file's name is a hash of everything that its content depends on, the options of the
    ``made_by`` components (the recipe's source and tokenizer) included. Files appear atomically, so
    processes may be killed or tokenise the same text at once. Takes memory for the largest
    document, or for its text alone if the tokenizer can split it. Raises DataError if the split has
    no text, ResourceError if the cache cannot be written.
    """
    fingerprint = tokens_fingerprint(source.fingerprint(), tokenizer, split, made_by)
    path = cache / f"tokens-{fingerprint}.bin"
    tokens = load_tokens(path, fingerprint)
    if tokens is None:
        with open_atomically(path, OTHER_CACHE) as file:
            write_tokens(file, source, tokenizer, split, fingerprint, progress)
        tokens = load_tokens(path, fingerprint)
    if tokens is None:
        raise ResourceError(
            f"{path} was written and cannot be read back: is the disk failing? Set LSWT_CACHE_DIR"
            " to another one"
        )
    return tokens


def tokens_fingerprint(
    text: str, tokenizer: Tokenizer, split: Split, made_by: Sequence[Chosen]
) -> str:
    """A hash of everything that the tokens of a split depend on; ``text`` is the fingerprint of
    their source.
    """
    parts = [FORMAT, text, tokenizer.fingerprint(), tokenizer.bos_id, split]
    return cache_key(json.dumps(parts), *made_by)


def write_tokens(
    file: BinaryIO,
    source: DataSource,
    tokenizer: Tokenizer,
    split: Split,
    fingerprint: str,
    progress: Progress,
) -> None:
    """Tokenise a split into a token file. Raises DataError if it has no text."""
    writer = TokenFileWriter(file, ids_dtype(tokenizer, source))
    total = source.n_bytes(split)
    documents = source.documents(split)
    n_bytes, n_empty = write_documents(
        writer, documents, tokenizer, lambda count, size: progress(count, size, total)
    )
    if not writer.names:
        raise DataError(no_text_message(source, split, n_empty))
    writer.finish(fingerprint, n_bytes, n_empty)


def ids_dtype(tokenizer: Tokenizer, source: DataSource) -> np.dtype:
    """The type that ids are stored in: signed if some are not predicted (see ``scored``)."""
    if source.selects_scored:
        return np.dtype("<i4")
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def write_documents(
    writer: TokenFileWriter,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    report: Callable[[int, int], None],
) -> tuple[int, int]:
    """Tokenise documents into a token file; returns bytes of text, and how many documents had none.
    ``report`` is called with documents and bytes so far.
    """
    n_bytes = n_empty = 0
    pieces = split_documents(documents, tokenizer)
    for group, encoded in encode_ahead(group_texts(pieces), tokenizer):
        for piece, ids in zip(group, encoded, strict=True):
            document = piece.document
            if not document.text:
                n_empty += 1
                continue
            stored = marked(ids, piece.is_scored)
            if piece.is_first:
                writer.begin_document(document.id)
                stored.insert(0, bos_of(document, tokenizer.bos_id))
            writer.add_ids(stored)
            n_bytes += len(piece.text.encode())
        report(len(writer.names) + n_empty, n_bytes)
    return n_bytes, n_empty


def split_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[TextPiece]:
    """Documents in the pieces that their tokenizer splits long texts into."""
    for document in documents:
        is_first = True
        for piece in pieces_of(document):
            for text in tokenizer.split_long_text(piece.text):
                yield TextPiece(document, text, is_first, piece.is_scored)
                is_first = False


def encode_ahead(
    groups: Iterable[list[TextPiece]], tokenizer: Tokenizer
) -> Iterator[tuple[list[TextPiece], list[list[int]]]]:
    """Groups of pieces with their ids, in order; a thread encodes the next group meanwhile. One
    thread, since tokenizers need not be thread-safe; the usual libraries use all cores by
    themselves.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as thread:
        waiting: tuple[list[TextPiece], Future[list[list[int]]]] | None = None
        for group in groups:
            task = thread.submit(tokenizer.encode, [piece.text for piece in group])
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = group, task
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def no_text_message(source: DataSource, split: str, n_empty: int) -> str:
    """The error message for a split without text."""
    counted = "not one document"
    if n_empty:
        counted = f"{n_empty} documents, all of them empty"
    return (
        f"the {split} split of data source {source.name!r} has no text: {counted}; give it more"
        " text or hold out another share"
    )


def group_texts(
    texts: Iterable[Texts], characters: int = 1 << 20, count: int = 256
) -> Iterator[list[Texts]]:
    """Texts in groups of about ``characters``, at most ``count`` each: large enough for a call of
    the tokenizer, small beside memory.
    """
    group: list[Texts] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text.text)
        if size >= characters or len(group) >= count:
            yield group
            group, size = [], 0
    if group:
        yield group
