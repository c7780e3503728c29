"""Where the memory states of a run's rows are between the passes of their micro-batches: on the
device, or in the host's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lswt_core.plugin_api.pytree import detach_state, tree_leaves, tree_map

CPU = torch.device("cpu")


class MemoryPlacement(Protocol):
    """Keeps memory states, one a micro-batch."""

    def fetch(self, states: Sequence[Any], i: int) -> Any:
        """State number ``i`` on the device; the next one may be read ahead."""

    def keep(self, state: Any) -> Any:
        """A state that a pass has returned, detached, where states are kept."""

    def restore(self, kept: Any) -> Any:
        """A state that was kept, read from a checkpoint, where states are kept."""

    def flush(self) -> None:
        """Wait until states that were kept can be read by the host."""


class DeviceMemory:
    """States stay on the device."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    def fetch(self, states: Sequence[Any], i: int) -> Any:
        """The state as it is."""
        return states[i]

    def keep(self, state: Any) -> Any:
        """The state, detached."""
        return detach_state(state)

    def restore(self, kept: Any) -> Any:
        """The state, copied if it is a view of more rows."""
        return detach_state(tree_map(lambda tensor: tensor.to(self.device), kept))

    def flush(self) -> None:
        """Nothing to wait for."""


class Transfer(NamedTuple):
    """A state on its way to the device."""

    source: Any
    state: Any
    done: torch.Event


class HostMemory:
    """States are kept in pinned host memory. Each is copied to the device while the micro-batch
    before it is computed, and its successor back while the next one is: two streams beside that of
    the computation.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inwards, self.outwards = torch.Stream(device), torch.Stream(device)
        self.ahead: dict[int, Transfer] = {}

    def fetch(self, states: Sequence[Any], i: int) -> Any:
        """State number ``i`` on the device; the next one is on its way."""
        transfer = self.ahead.pop(i, None)
        if transfer is None or transfer.source is not states[i]:
            transfer = self.send(states[i])
        self.ahead.clear()
        if i + 1 < len(states):
            self.ahead[i + 1] = self.send(states[i + 1])
        return self.receive(transfer)

    def receive(self, transfer: Transfer) -> Any:
        """A state that the computation can read."""
        stream = torch.accelerator.current_stream(self.device)
        stream.wait_event(transfer.done)
        for tensor in tree_leaves(transfer.state):
            tensor.record_stream(stream)
        return transfer.state

    def send(self, source: Any) -> Transfer:
        """Begin to copy a state to the device."""
        self.inwards.wait_stream(self.outwards)  # it may still be on its way to the host
        with self.inwards:
            state = tree_map(lambda t: t.to(self.device, non_blocking=True), source)
            return Transfer(source, state, self.inwards.record_event())

    def keep(self, state: Any) -> Any:
        """Begin to copy a state to the host."""
        self.outwards.wait_stream(torch.accelerator.current_stream(self.device))
        with self.outwards:
            return tree_map(self.to_host, state)

    def restore(self, kept: Any) -> Any:
        """The state in pinned memory."""
        return tree_map(Tensor.pin_memory, kept)

    def to_host(self, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor into pinned memory."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self.outwards)
        return host

    def flush(self) -> None:
        """Wait for copies to the host."""
        self.outwards.synchronize()


def placement_on(where: Literal["device", "host"], device: torch.device) -> MemoryPlacement:
    """Where the states of a run are kept; for a CPU the two are one."""
    if where == "host" and device.type != "cpu":
        return HostMemory(device)
    return DeviceMemory(device)
