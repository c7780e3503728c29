"""Being asked to stop: Ctrl-C, SIGTERM or a closed terminal once lets the run save and leave, Ctrl-C twice leaves at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class StopRequest:
    """Becomes true when a signal arrives; polled between micro-batches."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        """Has anyone asked?"""
        return self.asked

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGINT, SIGTERM and SIGHUP while the block runs."""
        before: dict[signal.Signals, Any] = {}

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C does not wait

        for wanted in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[wanted] = signal.signal(wanted, ask)
        try:
            yield self
        finally:
            for wanted, handler in before.items():
                signal.signal(wanted, handler)
