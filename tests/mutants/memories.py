"""Memories, each wrong in one way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State
from mutants.meant import CITED, meant


@meant("hidden state")
class Selfish(Memory):
    """Keeps keys and values on itself."""

    name, citation = "selfish", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length
        self.kept: Any = None

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *others, new = project(x, positions)
        k, v = new.k.detach(), new.v.detach()
        if state is not None:
            old = self.kept
            others.append(KeyValue(*old, torch.arange(-old[0].shape[1], 0)))
            k, v = torch.cat((old[0], k), 1), torch.cat((old[1], v), 1)
        self.kept = k, v
        return [*others, new], k


def keep(new: KeyValue, state: State) -> tuple[list[KeyValue], tuple[Tensor, Tensor]]:
    """What a right memory does."""
    k, v = new.k.detach(), new.v.detach()
    if state is None:
        return [new], (k, v)
    old = KeyValue(state[0], state[1], torch.arange(-state[0].shape[1], 0))
    return [old, new], (torch.cat((state[0], k), 1), torch.cat((state[1], v), 1))


@meant("causality")
class Peeking(Memory):
    """Every token meets the next one's value."""

    name, citation = "peeking", CITED

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *others, new = project(x, positions)
        return [*others, new._replace(v=new.v.roll(-1, 1))], None


@meant("state")
class Sideways(Memory):
    """Puts tokens before rows in its state."""

    name, citation = "sideways", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *_, new = project(x, positions)
        upright = None if state is None else tuple(t.transpose(0, 1) for t in state)
        segments, following = keep(new, upright)
        return segments, tuple(t.transpose(0, 1) for t in following)


@meant("state")
class Attached(Memory):
    """Lets gradients into the past."""

    name, citation = "attached", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *_, new = project(x, positions)
        segments, _ = keep(new, state)
        return segments, (
            torch.cat([s.k for s in segments], 1),
            torch.cat([s.v for s in segments], 1),
        )


@meant("state")
class Numbered(Memory):
    """Counts its calls in its state."""

    name, citation = "numbered", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *_, new = project(x, positions)
        segments, following = keep(new, None if state is None else state[0])
        return segments, (following, 0 if state is None else state[1] + 1)


@meant("streaming")
class Misplaced(Memory):
    """Gives remembered tokens coordinates that are one off."""

    name, citation = "misplaced", CITED

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *_, new = project(x, positions)
        segments, following = keep(new, state)
        return [
            s if s is new else s._replace(positions=s.positions - 1) for s in segments
        ], following  # type: ignore[operator]
