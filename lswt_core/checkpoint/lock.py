"""The lock of a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from lswt_core.errors import BusyError


class RunLock:
    """An exclusive lock on a run directory. The kernel releases it however the process ends."""

    def __init__(self, run: Path) -> None:
        self.path = run / "lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self.path.read_text(encoding="utf-8", errors="replace").strip()
            self._release()
            raise BusyError(
                f"{self.path.parent} is in use by {holder or 'another process'}; wait for it, stop"
                " it, or choose another --out"
            ) from None
        os.ftruncate(self._descriptor, 0)
        holder = f"process {os.getpid()} on {socket.gethostname()}\n"
        os.pwrite(self._descriptor, holder.encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        # the file is not removed: two processes could then lock different files of this name
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
