"""The process that items run in: ``python -m lswt_core.acceptance.worker``. It reads items as lines
of JSON from standard input, and answers each with a line. It ends, with all that it has started,
when its input does. Imports no torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from queue import Queue
from threading import Thread
from typing import Any, TextIO
from unittest import SkipTest


def main() -> None:
    """Answer every item."""
    answers = take_over_stdout()
    for request in requests():
        answers.write(json.dumps(answer(request)) + "\n")
        answers.flush()


def take_over_stdout() -> TextIO:
    """Standard output for answers alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def requests() -> Iterator[Mapping[str, Any]]:
    """The items asked for. The end of the input ends this process, whatever it is at."""
    lines: Queue[str] = Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        end_all()

    Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def end_all() -> None:
    """End this process and those it has started, which form a session."""
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run an item: its status, reason and numbers."""
    print(f"---------- {request['name']}", file=sys.stderr, flush=True)
    try:
        numbers = function_of(request["target"])(**request["arguments"])
    except SkipTest as reason:
        return {"status": "skipped", "reason": str(reason), "numbers": {}}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": describe(error), "numbers": {}}
    return {"status": "passed", "reason": "", "numbers": numbers}


def function_of(target: str) -> Callable[..., Mapping[str, Any]]:
    """Import "module:function"."""
    module, _, name = target.partition(":")
    function: Callable[..., Mapping[str, Any]] = getattr(import_module(module), name)
    return function


def describe(error: Exception) -> str:
    """An exception in one line; the log has its traceback."""
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, AssertionError) and line else f"{type(error).__name__}: {line}"


if __name__ == "__main__":
    main()
