"""Being asked to stop: Ctrl-C, SIGTERM or a closed terminal once lets the run save and leave,
Ctrl-C twice leaves at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lswt_core.errors import Preempted

# Windows has no SIGHUP
SIGNALS = [one for one in signal.Signals if one.name in ("SIGINT", "SIGTERM", "SIGHUP")]


class Stopped(BaseException):
    """Raised where the program stands, when it is asked to stop and has nothing to save. No
    Exception: much code catches those.
    """


class StopRequest:
    """Becomes true when a signal arrives; polled between micro-batches."""

    def __init__(self) -> None:
        self.asked = False
        self._at_once = False

    def __call__(self) -> bool:
        """Has anyone asked?"""
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGINT, SIGTERM and SIGHUP while the block runs, but those that whoever started
        the process wants ignored (nohup).
        """
        before: dict[signal.Signals, Any] = {}

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            if signal.SIGINT in before:
                # the second Ctrl-C does not wait
                signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._at_once:
                self._at_once = False
                raise Stopped

        try:
            for wanted in SIGNALS:
                handler = signal.getsignal(wanted)
                # None: somebody's who is not Python, and could not be put back
                if handler not in (signal.SIG_IGN, None):
                    before[wanted] = handler
                    signal.signal(wanted, ask)
            yield self
        finally:
            for wanted, handler in before.items():
                signal.signal(wanted, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While the block runs there is nothing to save: being asked to stop ends it where it
        stands, with Preempted.
        """
        self._at_once = True
        try:
            if self.asked:
                raise Stopped
            yield
            self._at_once = False  # within the block: from here on nothing is raised
        except Stopped:
            raise Preempted("stopped before the first step: there is nothing to save yet") from None
        finally:
            self._at_once = False
