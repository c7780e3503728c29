"""Atomic, durable writes of small files. Imports no torch."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryFile

from lswt_core.errors import ResourceError, UsageError

OTHER_DIRECTORY = "choose a directory that can be written, and run the same command again"


def write_atomically(path: Path, content: bytes, advice: str = OTHER_DIRECTORY) -> None:
    """Write a file, or leave the old one: to a temporary file, fsync, rename, fsync the directory.
    Several processes may write the same path; the last rename wins.

    Raises ResourceError, which says to free disk space or to do what ``advice`` says.
    """
    temporary = path.with_name(f".{path.name}.{token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ResourceError(
            f"{path} cannot be written: {error.strerror or error}; free disk space, or {advice}"
        ) from error


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
