"""One process to a run directory."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from lswt_core.errors import BusyError


class RunLock:
    """Holds a run directory for this process. The kernel lets go of it however the process ends."""

    def __init__(self, run: Path) -> None:
        self.path = run / "lock"
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        os.pwrite(
            self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0
        )
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
