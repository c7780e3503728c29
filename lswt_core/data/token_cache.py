"""Texts as memory-mapped token ids, tokenised once and kept in a cache file."""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np

from lswt_core.data.cache_keys import keyed
from lswt_core.errors import DataError, ResourceError
from lswt_core.interfaces import DataSource, Document, Tokenizer
from lswt_core.plugin_api.atomic_write import fsync
from lswt_core.recipe import Chosen

FORMAT = 1  # of the cache file; part of its key, so that another format is another file
FOOTER = struct.Struct("<QI4s")  # bytes of the header before it, the header's crc32, magic
MAGIC = b"LSWT"
BLOCK = 1 << 24  # bytes read at a time

# documents, bytes of text, bytes in all where the source can tell
Progress = Callable[[int, int, int | None], None]
logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A document or, of a long one, a part."""

    document: Document
    text: str
    first: bool


Texts = TypeVar("Texts", Document, Piece)


class Tokens(NamedTuple):
    """The token ids of one split, one document after the other."""

    # [tokens] uint16 or uint32, memory-mapped; every document begins with the tokenizer's `begin`
    ids: np.ndarray
    document_starts: np.ndarray  # [documents] int64: where each document begins in ids
    n_bytes: int  # UTF-8 bytes of the text
    n_empty: int  # documents without a single character, which were dropped
    names: list[str]  # ids of the documents
    fingerprint: str  # of source, tokenizer and split


def cache_directory() -> Path:
    """Where tokenised corpora and trained tokenizers are kept: LSWT_CACHE_DIR, or ~/.cache/lswt."""
    return Path(os.environ.get("LSWT_CACHE_DIR") or "~/.cache/lswt").expanduser()


def silent(documents: int, size: int, total: int | None) -> None:
    """Report no progress."""


def tokenise(
    source: DataSource,
    tokenizer: Tokenizer,
    split: Literal["train", "valid"],
    cache: Path,
    progress: Progress = silent,
    made_by: Sequence[Chosen] = (),
) -> Tokens:
    """The tokens of a split, from the cache where they are in it and whole, else made and put
    there.

    The file's name is a hash of what it was made from, the options of ``made_by``, the recipe's
    source and tokenizer, included. It is written beside its place and renamed, so a killed process
    leaves no half file in its place and two processes that make it at once both succeed. Memory is
    bounded by the largest documents, besides a few bytes a document; a document that its tokenizer
    can cut into pieces takes no more than its text.
    """
    parts = [FORMAT, source.fingerprint(), tokenizer.fingerprint(), tokenizer.bos_id, split]
    fingerprint = keyed(json.dumps(parts), *made_by)
    path = cache / f"tokens-{fingerprint}.bin"
    found = load(path, fingerprint)
    if found is None:
        with replacing(path) as file:
            write(file, source, tokenizer, split, fingerprint, progress)
        found = load(path, fingerprint)
    if found is None:
        raise ResourceError(
            f"{path} was written and cannot be read back: is the disk failing? Set LSWT_CACHE_DIR"
            " to another one"
        )
    return found


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place at ``path`` when it is complete, and leaves nothing behind when
    it is not.
    """
    part = path.with_name(f".{path.stem}-{token_hex(4)}.part")
    with guarded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("wb")
    try:
        with file:
            yield file
        with guarded(path):
            part.replace(path)
            fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def guarded(path: Path | str, *expected: type[OSError]) -> Iterator[None]:
    """Say what is to be done where the cache cannot be read or written, for a reason that is not
    expected.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, expected):
            raise
        cure = "make room, or set LSWT_CACHE_DIR to a directory that can be read and written"
        raise ResourceError(
            f"the cache of tokens {path} failed: {error.strerror or error}; {cure}"
        ) from error


def write(
    file: BinaryIO,
    source: DataSource,
    tokenizer: Tokenizer,
    split: Literal["train", "valid"],
    fingerprint: str,
    progress: Progress,
) -> None:
    """Write a cache file: ids, starts, names (one JSON string a line), header, footer."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    names, document_starts = [], array("q")
    tokens = n_bytes = n_empty = crc = 0
    total = source.n_bytes(split)
    for group, encoded in ahead(groups(cut(source.documents(split), tokenizer)), tokenizer):
        for (document, text, first), ids in zip(group, encoded, strict=True):
            if not document.text:
                n_empty += 1
                continue
            if first:
                document_starts.append(tokens)
                names.append(document.id)
            block = np.array([tokenizer.bos_id, *ids] if first else ids, dtype=dtype)
            crc = append(file, block.tobytes(), crc)
            tokens += block.size
            n_bytes += len(text.encode())
        progress(len(names) + n_empty, n_bytes, total)
    if not names:
        raise DataError(nothing(source, split, n_empty))
    counts = {"tokens": tokens, "documents": len(names), "n_bytes": n_bytes, "n_empty": n_empty}
    finish(
        file,
        document_starts,
        names,
        crc,
        {"fingerprint": fingerprint, "dtype": dtype.str, **counts},
    )


def cut(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Documents in the pieces that their tokenizer can take them in."""
    for document in documents:
        for number, text in enumerate(tokenizer.split_long_text(document.text)):
            yield Piece(document, text, number == 0)


def ahead(
    grouped: Iterable[list[Piece]], tokenizer: Tokenizer
) -> Iterator[tuple[list[Piece], list[list[int]]]]:
    """Groups of pieces and their ids, in order: while one is written the next is tokenised, one at
    a time, since a tokenizer need not bear to be used by two; those of the usual libraries use all
    cores by themselves.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as thread:
        waiting: tuple[list[Piece], Future[list[list[int]]]] | None = None
        for group in grouped:
            task = thread.submit(tokenizer.encode, [piece.text for piece in group])
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = group, task
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def finish(
    file: BinaryIO, document_starts: array[int], names: list[str], crc: int, header: dict[str, Any]
) -> None:
    """Write what comes after the ids, whose checksum ``crc`` is."""
    listed = "".join(json.dumps(name) + "\n" for name in names).encode()
    crc = append(file, np.array(document_starts, dtype="<i8").tobytes(), crc)
    crc = append(file, listed, crc)
    raw = json.dumps({**header, "names": len(listed), "crc": crc}).encode()
    append(file, raw + FOOTER.pack(len(raw), zlib.crc32(raw), MAGIC), 0)
    with guarded(file.name):
        file.flush()
        os.fsync(file.fileno())


def append(file: BinaryIO, data: bytes, crc: int) -> int:
    """Write some bytes; the checksum so far, carried on."""
    with guarded(file.name):
        file.write(data)
    return zlib.crc32(data, crc)


def nothing(source: DataSource, split: str, n_empty: int) -> str:
    """What to say of a split without text."""
    counted = f"{n_empty} documents, all of them empty" if n_empty else "not one document"
    return (
        f"the {split} split of data source {source.name!r} has no text: {counted}; give it more"
        " text or hold out another share"
    )


def groups(
    texts: Iterable[Texts], characters: int = 1 << 20, count: int = 256
) -> Iterator[list[Texts]]:
    """Texts in groups that are worth a call of the tokenizer and small beside memory."""
    group: list[Texts] = []
    size = 0
    for one in texts:
        group.append(one)
        size += len(one.text)
        if size >= characters or len(group) >= count:
            yield group
            group, size = [], 0
    if group:
        yield group


def load(path: Path, fingerprint: str) -> Tokens | None:
    """The tokens in a cache file; None if there is no such file or it is damaged."""
    try:
        with guarded(path, FileNotFoundError), path.open("rb") as file:
            header = read_header(file, fingerprint)
            document_starts = np.fromfile(file, "<i8", header["documents"])
            names = [json.loads(line) for line in file.read(header["names"]).splitlines()]
    except FileNotFoundError:
        return None
    except DamagedError as damage:
        logger.warning("%s %s: the text is tokenised again", path, damage)
        return None
    ids = np.memmap(path, header["dtype"], mode="r", shape=(header["tokens"],))
    return Tokens(ids, document_starts, header["n_bytes"], header["n_empty"], names, fingerprint)


class DamagedError(Exception):
    """A cache file is not what was written."""


def read_header(file: BinaryIO, fingerprint: str) -> dict[str, Any]:
    """Check a whole cache file (about 1 s a GB); its header, the file being left where the starts
    begin.
    """
    size = file.seek(0, os.SEEK_END)
    if size < FOOTER.size:
        raise DamagedError("is cut short")
    file.seek(size - FOOTER.size)
    length, header_crc, magic = FOOTER.unpack(file.read(FOOTER.size))
    body = size - FOOTER.size - length
    if magic != MAGIC or body < 0:
        raise DamagedError("does not end in a footer")
    file.seek(body)
    raw = file.read(length)
    if zlib.crc32(raw) != header_crc:
        raise DamagedError("has a damaged header")
    header = json.loads(raw)
    ids_bytes = header["tokens"] * np.dtype(header["dtype"]).itemsize
    if (
        header["fingerprint"] != fingerprint
        or ids_bytes + 8 * header["documents"] + header["names"] != body
    ):
        raise DamagedError("has a header that does not fit it")
    if checksum(file, body) != header["crc"]:
        raise DamagedError("has damaged content")
    file.seek(ids_bytes)
    return header


def checksum(file: BinaryIO, size: int) -> int:
    """The crc32 of the first bytes of a file."""
    file.seek(0)
    crc = 0
    for begin in range(0, size, BLOCK):
        crc = zlib.crc32(file.read(min(BLOCK, size - begin)), crc)
    return crc
