"""Runs items one after another within a time, whatever becomes of each. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from lswt_core.acceptance.child import Child, Crashed, Hung
from lswt_core.acceptance.item import Item, Result

LOG = "acceptance.log"


class Schedule:
    """Runs items in worker processes, until ``deadline`` by the monotonic clock.

    A worker is replaced where the group changes, and after an item that failed: an error of the
    device may have left it unusable. This process itself computes nothing.
    """

    def __init__(self, directory: Path, deadline: float) -> None:
        self.log, self.deadline = directory / LOG, deadline
        self.child: Child | None = None
        self.group = ""
        self.memory = 0  # bytes of the device

    def run(self, items: Sequence[Item], record: Callable[[Item, Result], None]) -> None:
        """Run every item that fits into the time; ``record`` is called after each."""
        try:
            for item in items:
                began = time.monotonic()
                result = self.run_item(item)
                record(item, result._replace(seconds=time.monotonic() - began))
        finally:
            self.replace_child()

    def run_item(self, item: Item) -> Result:
        """Run an item, or say why not."""
        left = self.deadline - time.monotonic()
        reason = obstacle(item, self.memory, left)
        if reason:
            return Result(item.name, "skipped", reason)
        try:
            result = self.child_for(item.group).ask(item, min(item.limit, left))
        except Hung:
            self.replace_child()
            return describe_hang(item, left)
        except Crashed as error:
            result = Result(item.name, "failed", str(error))
        if result.status == "failed":
            self.replace_child()
        return result

    def child_for(self, group: str) -> Child:
        """The worker of a group."""
        if self.child is not None and self.group != group:
            self.replace_child()
        if self.child is None:
            self.child, self.group = Child(self.log), group
        return self.child

    def replace_child(self) -> None:
        """End the worker; the next item starts another."""
        child, self.child = self.child, None
        if child is not None:
            child.close()


def obstacle(item: Item, memory: int, left: float) -> str:
    """Why an item is left out; "" if it is not."""
    missing = [name for name in item.libraries if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if item.memory > memory:
        return f"needs {item.memory / 1e9:.0f} GB of the device, which has {memory / 1e9:.0f}"
    if item.seconds > left:
        return f"no time: it takes about {item.seconds:.0f} s, {max(left, 0):.0f} s are left"
    return ""


def describe_hang(item: Item, left: float) -> Result:
    """The result of an item that was killed."""
    if left < item.limit:
        reason = f"no time: it was stopped after {left:.0f} s, when the time was over"
        return Result(item.name, "skipped", reason)
    return Result(item.name, "failed", f"still running after {item.limit:.0f} s, and killed")
