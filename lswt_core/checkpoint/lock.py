"""The lock of a run directory."""

from __future__ import annotations

import importlib
import os
import socket
import warnings
from pathlib import Path
from types import ModuleType, TracebackType

from lswt_core.errors import BusyError


def optional_module(name: str) -> ModuleType | None:
    """A module of the standard library; None on systems that lack it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


FCNTL = optional_module("fcntl")  # not on Windows
MSVCRT = optional_module("msvcrt")  # on Windows alone
# Windows keeps others from reading a byte that is locked, so this one is far behind the text
LOCKED_BYTE = 1 << 30


class RunLock:
    """An exclusive lock on a run directory. The kernel releases it however the process ends."""

    def __init__(self, run: Path) -> None:
        self.path = run / "lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            lock_file(self._descriptor)
        except BlockingIOError:
            holder = (
                self.path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
            )
            self._release()
            raise BusyError(
                f"{self.path.parent} is in use by {holder}; wait for it, stop it, or choose another"
                " --out"
            ) from None
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        # The file stays: if it were removed, two processes could each lock a file of this name.
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def lock_file(descriptor: int) -> None:
    """Lock an open file until it is closed. Raises BlockingIOError if another process holds it;
    warns where the system has no file locks.
    """
    if FCNTL is not None:
        FCNTL.flock(descriptor, FCNTL.LOCK_EX | FCNTL.LOCK_NB)
    elif MSVCRT is not None:
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        try:
            MSVCRT.locking(descriptor, MSVCRT.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
    else:
        warnings.warn(
            "this system has no file locks: start no second run in the same directory",
            stacklevel=2,
        )
