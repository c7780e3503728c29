"""Memories with one mistake each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State
from mutants.expected import CITATION, caught_by


@caught_by("stateless")
class StateOnModule(Memory):
    """Keeps keys and values on the module."""

    name, citation = "state-on-module", CITATION

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


def remember(new: KeyValue, state: State) -> tuple[list[KeyValue], tuple[Tensor, Tensor]]:
    """The blocks and the next state of a correct KV cache."""
    k, v = new.k.detach(), new.v.detach()
    if state is None:
        return [new], (k, v)
    old = KeyValue(state[0], state[1], torch.arange(-state[0].shape[1], 0))
    return [old, new], (torch.cat((state[0], k), 1), torch.cat((state[1], v), 1))


@caught_by("causality")
class ShiftedValues(Memory):
    """Pairs every key with the value of the next token."""

    name, citation = "shifted-values", CITATION

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *others, new = project(x, positions)
        return [*others, new._replace(v=new.v.roll(-1, 1))], None


@caught_by("state")
class TokensFirst(Memory):
    """The first dimension of its state is the token, not the row."""

    name, citation = "tokens-first", CITATION

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *_, new = project(x, positions)
        rows_first = None if state is None else tuple(t.transpose(0, 1) for t in state)
        blocks, following = remember(new, rows_first)
        return blocks, tuple(t.transpose(0, 1) for t in following)


@caught_by("state")
class Attached(Memory):
    """Does not detach its state."""

    name, citation = "attached", CITATION

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *_, new = project(x, positions)
        blocks, _ = remember(new, state)
        return blocks, (
            torch.cat([block.k for block in blocks], 1),
            torch.cat([block.v for block in blocks], 1),
        )


@caught_by("state")
class NumberInState(Memory):
    """Its state holds a number, not only tensors."""

    name, citation = "number-in-state", CITATION

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *_, new = project(x, positions)
        blocks, following = remember(new, None if state is None else state[0])
        return blocks, (following, 0 if state is None else state[1] + 1)


@caught_by("segment invariance")
class ShiftedPositions(Memory):
    """The positions of its tokens are one too low."""

    name, citation = "shifted-positions", CITATION

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *_, new = project(x, positions)
        blocks, following = remember(new, state)
        *old, _ = blocks
        shifted = [block._replace(positions=block.positions - 1) for block in old]  # type: ignore[operator]
        return [*shifted, new], following


class Remembering(Memory):
    """A correct KV cache, the base of mutants."""

    citation = CITATION

    def __init__(self, dims: Dims, *, length: int = 64) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        *_, new = project(x, positions)
        blocks, following = remember(new, state)
        return blocks, tuple(tensor[:, -self.kept :] for tensor in following)

    @property
    def kept(self) -> int:
        """The number of tokens that it keeps."""
        return self.length


@caught_by("causality")
class ShowsTheFuture(Remembering, Memory):
    """From the second segment on, the last of its keys are the segment's own, which every query
    sees.
    """

    name = "shows-the-future"

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        blocks, following = super().forward(x, positions, state, project)
        *cached, new = blocks
        shown = []
        for old in cached:
            k, v = torch.cat((old.k, new.k), 1), torch.cat((old.v, new.v), 1)
            count = old.k.shape[1]
            shown.append(old._replace(k=k[:, -count:], v=v[:, -count:]))
        return [*shown, new], following


@caught_by("long sequences")
class ForgetsEarly(Remembering, Memory):
    """Keeps at most 100 tokens, whatever its length."""

    name = "forgets-early"

    @property
    def kept(self) -> int:
        return min(self.length, 100)


@caught_by("reach")
class KeepsTooMuch(Remembering, Memory):
    """Keeps more tokens than its length."""

    name = "keeps-too-much"

    @property
    def kept(self) -> int:
        return self.length + 10
