"""Stop requests: Ctrl-C, SIGTERM or a closed terminal lets the run save and stop; a second Ctrl-C
leaves at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from lswt_core.errors import PluginError, Preempted
from lswt_core.registry import Registry

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
STDERR = 2


class Stopped(BaseException):
    """A stop was requested while there is nothing to save. No Exception, because plugins and
    libraries catch those.
    """


class StopRequest:
    """A flag set by a signal and polled between micro-batches; calling it reads the flag."""

    def __init__(self, notice: str = "") -> None:
        """``notice`` is written to stderr when the first signal arrives; empty: nothing is."""
        self.requested = False
        self._notice = notice
        self._raise_at_once = False
        self._replaced: dict[signal.Signals, Any] = {}  # handlers to put back

    def __call__(self) -> bool:
        """Whether a stop was requested."""
        return self.requested

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle SIGINT, SIGTERM and SIGHUP within the block, except those that the parent process
        set to be ignored (nohup).
        """
        try:
            for number in SIGNALS:
                handler = signal.getsignal(number)
                # None: a handler that was not installed by Python and cannot be put back
                if handler not in (signal.SIG_IGN, None):
                    self._replaced[number] = handler
                    signal.signal(number, self._handle)
            yield self
        finally:
            for number, handler in self._replaced.items():
                signal.signal(number, handler)
            self._replaced.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        first, self.requested = not self.requested, True
        if signal.SIGINT in self._replaced:
            # the second Ctrl-C raises KeyboardInterrupt
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._raise_at_once:
            self._raise_at_once = False
            raise Stopped
        if first and self._notice:
            # not print, which must not be entered again if the signal interrupted it
            with suppress(OSError):
                os.write(STDERR, f"\n{self._notice}\n".encode())

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """End the block where it stands, with Preempted, when a stop is requested: for what comes
        before the first step, when there is nothing to save.
        """
        self._raise_at_once = True
        try:
            if self.requested:
                raise Stopped
            yield
            self._raise_at_once = False  # within the block: nothing is raised from here on
        except Stopped:
            raise Preempted("stopped before the first step: there is nothing to save yet") from None
        finally:
            self._raise_at_once = False


def blame_plugin(interrupt: KeyboardInterrupt, registry: Registry) -> None:
    """Raise PluginError if an interrupt that nobody requested was raised by a plugin's own code."""
    culprit = registry.culprit(interrupt)
    if culprit is not None:
        raise PluginError(
            f"{culprit}\n  why: KeyboardInterrupt was raised by the plugin's own code, not by"
            " Ctrl-C\n  fix: mend it"
        ) from interrupt
