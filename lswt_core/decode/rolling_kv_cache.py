"""A decoder's double for reading on token by token: weights already in the precision that is
computed in, and memories as rings of keys that are encoded once, so that a token costs the same
wherever in a text it stands.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.interfaces import KeyValue, KVProjection, Memory, PositionalEncoding, State
from lswt_core.model.attention import Attention
from lswt_core.model.decoder import Block, Decoder
from lswt_core.model.embedding import TiedEmbedding
from lswt_core.model.plain_modules import is_ordinary


class CacheState:
    """How many tokens were read: known to the host, so that no device is waited for."""

    def __init__(self) -> None:
        self.read = 0
        # whether every single token is read by the same operations, however many were read
        self.alike = False


class RollingKVCache(Memory):
    """What a rolling memory keeps, encoded where it stands in the stream, in a ring that is written
    in place.

    The ring has room for one token more than the memory: a single new token is written first and
    then met there with all others, and nothing is copied. Its state must be continued once only.
    """

    def __init__(self, memory: Memory, positional: PositionalEncoding, clock: CacheState) -> None:
        nn.Module.__init__(self)
        self.length, self.window = memory.length, memory.window
        self.positional, self.clock = positional, clock

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """The tokens that are remembered and the new ones, encoded; the last segment holds both
        where there is one new token.
        """
        *others, new = project(x, positions)
        k, v = self.positional.rotate(new.k, positions), new.v
        room = self.length + 1
        if state is None:
            # heads first: what attention multiplies lies together
            shape = (k.shape[0], k.shape[2], room, k.shape[3])
            state = {"k": k.new_zeros(shape), "v": v.new_zeros(shape)}
        # taken out before it is overwritten
        old = [] if k.shape[1] == 1 else self.remembered(state, positions)
        newest = slice(max(0, k.shape[1] - room), None)
        slots = positions[newest] % room
        state["k"].index_copy_(2, slots, k[:, newest].transpose(1, 2).to(state["k"].dtype))
        state["v"].index_copy_(2, slots, v[:, newest].transpose(1, 2).to(state["v"].dtype))
        if k.shape[1] > 1:
            return [*others, *old, KeyValue(k, v, positions, encoded=True)], state
        filled = room if self.clock.alike else min(self.clock.read + 1, room)
        places = (
            positions - (positions - torch.arange(filled, device=positions.device)) % room
        )  # of slot i: the newest that falls there; below 0 if none
        k, v = (state[key][:, :, :filled].transpose(1, 2) for key in ("k", "v"))
        return [*others, KeyValue(k, v, places, encoded=True)], state

    def remembered(self, state: dict[str, Tensor], positions: Tensor) -> list[KeyValue]:
        """What was read before, in its order."""
        count = min(self.clock.read, self.length)
        if not count:
            return []
        places = torch.arange(self.clock.read - count, self.clock.read, device=positions.device)
        k, v = (
            state[key].index_select(2, places % (self.length + 1)).transpose(1, 2)
            for key in ("k", "v")
        )
        return [KeyValue(k, v, places, encoded=True)]


@contextmanager
def products_of(x: Tensor) -> Iterator[None]:
    """While it lasts, a single row x [..., M] on a CPU is multiplied by torch's own kernels:
    oneDNN's, made for many rows, reach half of the memory's bandwidth with one.
    """
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(
        before and not (x.device.type == "cpu" and x.numel() == x.shape[-1])
    )
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class RowLinear(nn.Linear):
    """A linear layer that often sees a single row."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        with products_of(x):
            return super().forward(x)


def inference_copy(decoder: Decoder, dtype: torch.dtype) -> tuple[Decoder, CacheState | None]:
    """A double of a decoder that computes the same, sharing all parameters but those it holds in
    ``dtype``; and the clock of its rings, None if some memory or encoding cannot be kept in one.
    """
    twin: Any = double(decoder, dtype)
    if not can_roll(decoder):
        return twin, None
    clock = CacheState()
    for block in twin.blocks:
        positional = block.positional or twin.positional
        for name, memory in block.attention.memory.items():
            if memory.length:
                block.attention.memory._modules[name] = RollingKVCache(memory, positional, clock)
    return twin, clock


def double(module: nn.Module, dtype: torch.dtype, owner: nn.Module | None = None) -> nn.Module:
    """A module of the same parameters; those that autocast rounds at every call are rounded once."""
    twin = copy.copy(module)
    twin._modules = {
        name: None if child is None else double(child, dtype, module)
        for name, child in module._modules.items()
    }
    twin._parameters = dict(module._parameters)
    if type(module) is nn.Linear:
        twin.__class__ = RowLinear
    if isinstance(module, nn.Linear) or isinstance(owner, TiedEmbedding):
        twin._parameters = {name: rounded(p, dtype) for name, p in module._parameters.items()}
    return twin


def rounded(parameter: nn.Parameter | None, dtype: torch.dtype) -> nn.Parameter | None:
    """A parameter in a precision; itself where it is so already, or where all is computed in
    float32 at least.
    """
    if (
        parameter is None
        or dtype not in (torch.bfloat16, torch.float16)
        or parameter.dtype == dtype
    ):
        return parameter
    if not is_ordinary(parameter):  # quantised: its module knows what it stands for
        return parameter
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def can_roll(decoder: Decoder) -> bool:
    """Whether every layer remembers keys and values that stay as they are while the text goes on."""
    return type(decoder.positional).embed is PositionalEncoding.embed and all(
        rolls(block, decoder) for block in decoder.blocks
    )  # type: ignore[arg-type]


def rolls(block: Block, decoder: Decoder) -> bool:
    """Whether a layer does."""
    positional = decoder.positional if block.positional is None else block.positional
    attention: Attention = block.attention
    keeping = [
        memory
        for memory in attention.memory.values()
        if isinstance(memory, Memory) and memory.length
    ]
    alone = type(positional).encode is PositionalEncoding.encode  # each key by its own place
    return (
        bool(keeping)
        and all(memory.is_kv_cache for memory in keeping)
        and positional.cacheable_keys
        and alone
    )
