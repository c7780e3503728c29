"""Small files that appear whole or not at all, and are still there after a loss of power. Imports
no torch.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from lswt_core.errors import ResourceError, UsageError


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place, or leave the old one: content first, then its name, then the
    directory. Raises ResourceError.

    One process at a time may write a file of this name.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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
        cure = "make room, or a directory that can be written, and give the same command again"
        raise ResourceError(
            f"{path} cannot be written: {error.strerror or error}; {cure}"
        ) from error


def fsync(path: Path) -> None:
    """Force a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and those it lies in, each with its name on the disk; it may exist."""
    missing = [parent for parent in (path, *path.parents) if not parent.is_dir()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync(made.parent)


def make_output_directory(path: Path, option: str) -> None:
    """Make a directory, with its parents, that files can be written to; raises UsageError, which
    names the ``option`` to change, if that cannot be. It is tried by writing a file without a name:
    permissions alone do not tell of read-only file systems.
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
