"""The scheduler's end of a worker process. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from lswt_core.acceptance.item import Item, Result, Status

WORKER = "lswt_core.acceptance.worker"


class Hung(Exception):
    """A worker did not answer in time."""


class Crashed(Exception):
    """A worker ended without an answer."""


class Child:
    """A worker process. Its output is appended to a log."""

    def __init__(self, log: Path) -> None:
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,  # with the processes that it starts
            )
        self.answers: Queue[bytes | None] = Queue()  # None: the process has ended
        self.reader = Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.answers.put(line)
        self.answers.put(None)

    def ask(self, item: Item, limit: float) -> Result:
        """Run an item within ``limit`` seconds. Raises Hung or Crashed; the process is then of no
        more use.
        """
        request = {"name": item.name, "target": item.target, "arguments": dict(item.arguments)}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=limit)
        except Empty:
            raise Hung from None
        except BrokenPipeError:
            line = None
        if line is None:
            raise Crashed(describe_exit(self.process.wait()))
        answer: dict[str, Any] = json.loads(line)
        status: Status = answer["status"]
        return Result(item.name, status, answer["reason"], answer["numbers"])

    def close(self) -> None:
        """End the process and those that it has started."""
        try:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        except ProcessLookupError:  # it has ended already
            pass
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # of a request that it has not read
            self.process.stdin.close()
        self.process.wait()
        self.reader.join()


def describe_exit(code: int) -> str:
    """How a process ended."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"its process was killed by signal {-code}{hint}"
