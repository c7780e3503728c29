"""The file format of tokenised texts: token ids, document starts, document names (one JSON string a
line), a JSON header with a checksum, and a footer.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lswt_core.data.concatenated import ConcatenatedIds
from lswt_core.errors import DataError, ResourceError
from lswt_core.plugin_api.atomic_write import OTHER_CACHE

FORMAT = 1  # version; part of the cache key
FOOTER = struct.Struct("<QI4s")  # bytes of the header before it, the header's crc32, magic
MAGIC = b"LSWT"
BLOCK = 1 << 24  # bytes read at a time

logger = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """The token ids of one split, one document after the other."""

    # [tokens] uint16 or uint32, memory-mapped; every document begins with BOS. int32 where some
    # tokens are not predicted (see ``scored``).
    ids: np.ndarray | ConcatenatedIds
    document_starts: np.ndarray  # [documents] int64: where each document begins in ids
    n_bytes: int  # UTF-8 bytes of the text
    n_empty: int  # documents without text, which were dropped
    names: Sequence[str]  # ids of the documents
    fingerprint: str  # of source, tokenizer and split
    label_counts: np.ndarray | None = None  # [vocab_size] how often each id is a label, if known


class DamagedError(Exception):
    """A token file is not what was written."""


class TokenFileWriter:
    """Writes a token file block by block; memory grows only with the number of documents."""

    def __init__(self, file: BinaryIO, dtype: np.dtype, advice: str = OTHER_CACHE) -> None:
        """``advice``: what else helps where the file cannot be written."""
        self.file, self.dtype, self.advice = file, dtype, advice
        self.names: list[str] = []
        self.document_starts = array("q")
        self.n_tokens = self.crc = 0

    def begin_document(self, name: str) -> None:
        """Start a document; its ids follow."""
        self.document_starts.append(self.n_tokens)
        self.names.append(name)

    def add_ids(self, ids: list[int]) -> None:
        """Append stored ids to the current document. Raises DataError if some are not predicted,
        and the file has no room to say so.
        """
        if self.dtype.kind == "u" and ids and min(ids) < 0:
            raise DataError(
                f"document {self.names[-1]!r} has ranges of scored characters, but its source says"
                " that all are: it must set selects_scored = True"
            )
        block = np.array(ids, dtype=self.dtype)
        self._write_checked(block.tobytes())
        self.n_tokens += block.size

    def finish(self, fingerprint: str, n_bytes: int, n_empty: int, **more: Any) -> None:
        """Write everything after the ids; ``more`` is JSON data for the header."""
        names = "".join(json.dumps(name) + "\n" for name in self.names).encode()
        self._write_checked(np.array(self.document_starts, dtype="<i8").tobytes())
        self._write_checked(names)
        header = {
            "fingerprint": fingerprint,
            "dtype": self.dtype.str,
            "tokens": self.n_tokens,
            "documents": len(self.names),
            "n_bytes": n_bytes,
            "n_empty": n_empty,
            "names": len(names),
            "crc": self.crc,
            **more,
        }
        encoded = json.dumps(header).encode()
        footer = FOOTER.pack(len(encoded), zlib.crc32(encoded), MAGIC)
        with explained_io_errors(self.file.name, advice=self.advice):
            self.file.write(encoded + footer)

    def _write_checked(self, data: bytes) -> None:
        """Write bytes that the checksum covers."""
        with explained_io_errors(self.file.name, advice=self.advice):
            self.file.write(data)
        self.crc = zlib.crc32(data, self.crc)


@contextmanager
def explained_io_errors(
    path: Path | str, *expected: type[OSError], advice: str = OTHER_CACHE
) -> Iterator[None]:
    """Turn an OSError of a token file, unless expected, into a ResourceError with a remedy."""
    try:
        yield
    except expected:
        raise
    except OSError as error:
        raise ResourceError(
            f"the token file {path} cannot be used: {error.strerror or error}; free disk space, or"
            f" {advice}"
        ) from error


def load_tokens(path: Path, fingerprint: str) -> Tokens | None:
    """The tokens of a file; None if there is no file or it is damaged, which is logged."""
    try:
        with explained_io_errors(path, FileNotFoundError), path.open("rb") as file:
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


def read_header(file: BinaryIO, fingerprint: str) -> dict[str, Any]:
    """The header of a token file whose checksum is right (about 1 s a GB); leaves the file at the
    document starts. Raises DamagedError.
    """
    header, body = read_unchecked_header(file)
    if header["fingerprint"] != fingerprint:
        raise DamagedError("has a header that does not fit it")
    if checksum(file, body) != header["crc"]:
        raise DamagedError("has damaged content")
    file.seek(header["tokens"] * np.dtype(header["dtype"]).itemsize)
    return header


def read_unchecked_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a token file, and the bytes before it, whose content is not checked. Raises
    DamagedError.
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
    encoded = file.read(length)
    if zlib.crc32(encoded) != header_crc:
        raise DamagedError("has a damaged header")
    header: dict[str, Any] = json.loads(encoded)
    ids_bytes = header["tokens"] * np.dtype(header["dtype"]).itemsize
    if ids_bytes + 8 * header["documents"] + header["names"] != body:
        raise DamagedError("has a header that does not fit it")
    return header, body


def checksum(file: BinaryIO, size: int) -> int:
    """The crc32 of a file's first ``size`` bytes."""
    file.seek(0)
    crc = 0
    for begin in range(0, size, BLOCK):
        crc = zlib.crc32(file.read(min(BLOCK, size - begin)), crc)
    return crc
