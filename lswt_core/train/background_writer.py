"""Writing a checkpoint while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from lswt_core.checkpoint.pieces import Piece

Groups = dict[str, dict[str, Piece]]


class BackgroundWriter:
    """Runs one write at a time in a thread. What it writes is a copy in host memory, of which there
    is one: the next write waits for the last.
    """

    def __init__(self, on_saved: Callable[[Path], None]) -> None:
        """``on_saved`` is called by ``poll`` with the path of a checkpoint that is complete."""
        self.on_saved = on_saved
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None

    def submit(self, write: Callable[[], Path]) -> None:
        """Start a write, once the last has ended. Raises what the last one raised."""
        self.wait()
        self.pending = self.thread.submit(write)

    @property
    def has_failed(self) -> bool:
        """Whether the write has ended with an error, which ``wait`` raises."""
        pending = self.pending
        return pending is not None and pending.done() and pending.exception() is not None

    def poll(self) -> None:
        """Announce the checkpoint that was completed meanwhile."""
        if self.pending is not None and self.pending.done() and not self.has_failed:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written. Raises what the write raised."""
        pending, self.pending = self.pending, None
        if pending is not None:
            self.on_saved(pending.result())

    def close(self) -> None:
        """Wait until nothing is being written, whatever became of it."""
        self.thread.shutdown(wait=True)


def copy_to_host(groups: Groups, but: Container[str] = ()) -> Groups:
    """A copy that later updates do not change; groups that are one already are left as they are.
    Copies from a device overlap each other.
    """
    copied: Groups = {}
    devices = set()
    for group, pieces in groups.items():
        if group in but:
            copied[group] = pieces
            continue
        copied[group] = {}
        for name, piece in pieces.items():
            tensor = piece.tensor.detach()
            devices.add(tensor.device)
            host = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
            )
            host.copy_(tensor, non_blocking=True)
            copied[group][name] = Piece(host, piece.offsets, piece.shape)
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return copied
