"""Write a directory atomically: completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lswt_core.errors import CheckpointError
from lswt_core.plugin_api.atomic_write import fsync, make_output_directory


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Yield a temporary directory that is flushed to disk and renamed to ``out`` on success, and
    removed on an exception. Nothing is overwritten.

    Raises CheckpointError if ``out`` is not empty, UsageError if it cannot be created.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"{out} exists and is not empty; nothing was written\n"
            "  fix: name a new directory, or remove this one first"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_output_directory(out.parent, "directory")
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            fsync(path)
        if out.exists():
            out.rmdir()
        partial.rename(out)
        fsync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
