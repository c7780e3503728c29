"""Memories of the last tokens: how long they are, and letting them be longer or shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from lswt_core.interfaces import Memory
from lswt_core.model.decoder import Decoder


def last_token_memories(module: nn.Module) -> list[Memory]:
    """Return the memories of the last tokens: a state of theirs is as long as their ``length``
    says, which may be another one than in training.
    """
    return [
        memory
        for memory in module.modules()
        if isinstance(memory, Memory)
        and memory.length > 0
        and memory.window is None
        and memory.position_dependent_from is None
    ]


def can_be_cut(decoder: Decoder) -> bool:
    """Whether all that layers keep between segments is in memories of the last tokens."""
    keeping = [layer for layer in decoder.layers() if layer.reach != 0]
    return bool(keeping) and all(last_token_memories(layer) for layer in keeping)


def longest_memory(decoder: Decoder) -> int:
    """Return how many of the last tokens the longest of these memories keeps; 0 without one."""
    return max((memory.length for memory in last_token_memories(decoder)), default=0)


def memory_length(decoder: Decoder, length: int) -> AbstractContextManager[None]:
    """Let every memory of the last tokens keep ``length`` of them, at least 1, as long as the block
    lasts.
    """
    return with_lengths(decoder, lambda _: length)


def longer_memories(decoder: Decoder, more: int) -> AbstractContextManager[None]:
    """Let every memory of the last tokens keep so many ``more``, as long as the block lasts."""
    return with_lengths(decoder, lambda own: own + more)


@contextmanager
def with_lengths(decoder: Decoder, length: Callable[[int], int]) -> Iterator[None]:
    """Change the lengths of memories of the last tokens, as long as the block lasts."""
    memories = last_token_memories(decoder)
    before = [memory.length for memory in memories]
    try:
        for memory in memories:
            memory.length = length(memory.length)
        yield
    finally:
        for memory, own in zip(memories, before, strict=True):
            memory.length = own
