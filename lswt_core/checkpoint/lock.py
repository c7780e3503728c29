"""The lock of a run directory."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import socket
import warnings
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
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
# of an OSError: the file system (NFS without a lock daemon, say) has no locks
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
logger = logging.getLogger(__name__)


class RunLock:
    """An exclusive lock on a run directory. The kernel releases it however the process ends.

    On a file system without locks a file that exists while it is held takes its place. A killed
    process leaves that behind: another one on the same machine removes it.
    """

    def __init__(self, run: Path, name: str = "lock") -> None:
        self.path = run / name
        self._descriptor: int | None = None
        self._held: Path | None = None  # the file that takes the lock's place

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock(self._descriptor)
        except BlockingIOError:
            holder = (
                self.path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
            )
            self._release()
            raise BusyError(
                f"{self.path.parent} is in use by {holder}; wait for it, stop it, or choose another"
                f" --out{self._remedy()}"
            ) from None
        except BaseException:
            self._release()
            raise
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, this_process().encode())
        return self

    def _lock(self, descriptor: int) -> None:
        """Lock the file, or create the one that takes the lock's place. Raises BlockingIOError."""
        try:
            lock_file(descriptor)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: %s; another file takes its place", self.path, error.strerror)
            create_held(self.substitute)
            self._held = self.substitute

    @property
    def substitute(self) -> Path:
        """The file that takes the lock's place."""
        return self.path.with_name(f"{self.path.name}.held")

    def _remedy(self) -> str:
        """What to do about a process that cannot be asked, because it was on another machine."""
        if not self.substitute.is_file():
            return ""
        return f". If it is gone, remove {self.substitute}"

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
        if self._held is not None:
            self._held.unlink(missing_ok=True)
            self._held = None


def this_process() -> str:
    """Return number and machine of the process, for people and for ``is_gone``."""
    return f"process {os.getpid()} on {socket.gethostname()}\n"


def create_held(path: Path) -> None:
    """Create a file that exists while a lock is held, or take over that of a process that is gone.
    Raises BlockingIOError if another process holds it.
    """
    with suppress(FileNotFoundError):  # nobody holds it
        if is_gone(path.read_text(encoding="utf-8")):
            put_aside(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError as error:
        raise BlockingIOError from error
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(this_process())


def put_aside(path: Path) -> None:
    """Remove the file of a process that is gone, unless another process has just replaced it."""
    aside = path.with_name(f"{path.name}.{token_hex(4)}")
    path.rename(aside)
    if is_gone(aside.read_text(encoding="utf-8")):
        aside.unlink()
    else:
        aside.rename(path)


def is_gone(holder: str) -> bool:
    """Whether a lock was held by a process of this machine that has ended."""
    words = holder.split()
    if len(words) != 4 or not words[1].isdigit() or words[3] != socket.gethostname():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


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
