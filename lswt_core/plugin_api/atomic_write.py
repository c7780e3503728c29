"""Atomic, durable writes of files. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryFile
from typing import BinaryIO

from lswt_core.errors import ResourceError, UsageError

OTHER_DIRECTORY = "choose a directory that can be written, and run the same command again"
OTHER_CACHE = "set LSWT_CACHE_DIR to a directory that can be read and written"
STALE_SECONDS = 86400  # after its last write, a temporary file has no writer any more


def write_atomically(path: Path, content: bytes, advice: str = OTHER_DIRECTORY) -> None:
    """Write a file, or leave the old one (see ``open_atomically``)."""
    with open_atomically(path, advice) as file, explain_write_errors(path, advice):
        file.write(content)


@contextmanager
def open_atomically(path: Path, advice: str = OTHER_DIRECTORY) -> Iterator[BinaryIO]:
    """A file that replaces ``path`` when the block succeeds, durably, and is removed when it does
    not. Several processes may write the same path; the last rename wins.

    Raises ResourceError, which says to free disk space or to do what ``advice`` says; exceptions of
    the block are passed on.
    """
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    with explain_write_errors(path, advice):
        make_directory(path.parent)
        remove_stale(path)
        file = temporary.open("wb")
    try:
        yield file
        publish(file, temporary, path, advice)
    finally:
        with suppress(OSError):  # what a full disk refused is flushed once more
            file.close()
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish(file: BinaryIO, temporary: Path, path: Path, advice: str = OTHER_DIRECTORY) -> None:
    """Close the written ``temporary`` file and give it its name, durably. Raises ResourceError."""
    with explain_write_errors(path, advice):
        file.flush()
        os.fsync(file.fileno())
        file.close()
        temporary.replace(path)
        fsync(path.parent)


@contextmanager
def explain_write_errors(path: Path, advice: str) -> Iterator[None]:
    """Turn an OSError into a ResourceError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written: {error.strerror or error}; free disk space, or {advice}"
        ) from error


def remove_stale(path: Path) -> None:
    """Remove temporary files that processes left beside ``path`` when they were killed."""
    for temporary in path.parent.glob(f".{escape(path.name)}.*.tmp"):
        with suppress(OSError):  # another process may have removed it meanwhile
            if time.time() - temporary.stat().st_mtime > STALE_SECONDS:
                temporary.unlink()


def fsync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, durably; it may exist."""
    missing = [parent for parent in (path, *path.parents) if not parent.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for created in missing:
        fsync(created.parent)


def make_output_directory(path: Path, option: str) -> None:
    """Create a directory and its parents, and check that it is writable by writing a temporary
    file: permissions alone do not show a read-only file system. Raises UsageError, which names the
    command line's ``option``.
    """
    try:
        make_directory(path)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        why = "it is a file" if path.is_file() else error.strerror or str(error)
        raise UsageError(
            f"{path} cannot be written to: {why}\n  fix: choose another {option}"
        ) from error
