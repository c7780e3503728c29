"""Memory states in the host's memory: each pass sees the state it is to see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lswt_core.plugin_api.pytree import tree_map
from lswt_core.train.memory_placement import (
    DeviceMemory,
    HostMemory,
    MemoryPlacement,
    Transfer,
    memory_placement,
)


class Rehearsed(HostMemory):
    """Host memory without an accelerator: transfers are copies, which are complete only when they
    are received; before that they hold nothing.
    """

    def __init__(self) -> None:
        self.ahead, self.sent = {}, []

    def send(self, source: Any) -> Transfer:
        self.sent.append(source)
        empty = tree_map(lambda t: torch.full_like(t, float("nan")), source)
        return Transfer(source, empty, None)  # type: ignore[arg-type]

    def receive(self, transfer: Transfer) -> Any:
        return tree_map(torch.clone, transfer.source)

    def keep(self, state: Any) -> Any:
        return tree_map(lambda t: t.detach().clone(), state)


def states(*numbers: float) -> list[Any]:
    return [({"xl": {"k": torch.full((2, 3), float(number))}},) for number in numbers]


def number_of(state: Any) -> float:
    return float(state[0]["xl"]["k"][0, 0])


def test_every_pass_gets_its_state_and_the_next_is_read_ahead() -> None:
    placement, memory = Rehearsed(), states(1, 2, 3)
    for i in range(3):
        assert number_of(placement.fetch(memory, i)) == i + 1
        assert len(placement.sent) == min(i + 2, 3)
    assert not placement.ahead


def test_what_a_step_that_was_given_up_read_ahead_is_not_used() -> None:
    placement = Rehearsed()
    placement.fetch(states(1, 2, 3), 0)
    after = states(4, 5, 6)
    assert number_of(placement.fetch(after, 1)) == 5
    placement.fetch(after, 0)
    assert number_of(placement.fetch(states(7, 8, 9), 1)) == 8


def test_a_cold_memory_stays_cold() -> None:
    placement: MemoryPlacement
    for placement in (Rehearsed(), DeviceMemory()):
        assert placement.fetch([None, None], 1) is None


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_cpu_has_one_memory(where: Any) -> None:
    assert isinstance(memory_placement(where, torch.device("cpu")), DeviceMemory)
