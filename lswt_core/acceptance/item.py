"""An item of the acceptance, and its result. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

Status = Literal["passed", "failed", "skipped"]


class Item(NamedTuple):
    """A check or a benchmark."""

    name: str  # "attention/sdpa bfloat16"
    asserts: str  # what holds if it passes, and the cause of its bound
    # "module:function", which returns numbers by name; it raises an exception if the item fails,
    # unittest.SkipTest if it does not apply here
    target: str
    arguments: Mapping[str, Any]
    seconds: float  # estimate: the item starts only if so much time is left
    limit: float  # seconds after which it is killed
    group: str  # items of a group that follow each other share a process
    libraries: tuple[str, ...] = ()  # modules without which it is skipped
    memory: int = 0  # bytes of the device that it needs


class Result(NamedTuple):
    """What became of an item."""

    name: str
    status: Status
    reason: str = ""  # of a failure, or of leaving it out
    numbers: Mapping[str, Any] = {}
    seconds: float = 0.0


class Unmet(AssertionError):
    """What an item asserts does not hold."""


def require(condition: object, message: str) -> None:
    """Raise Unmet with the message unless the condition holds."""
    if not condition:
        raise Unmet(message)
