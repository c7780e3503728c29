"""KV caches of a run's rows in a narrower type than they are computed in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.interfaces import Memory
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention
from lswt_core.train.memory_placement import MemoryPlacement

KEYS_AND_VALUES = ("k", "v")  # of Memory.is_kv_cache
# the magnitude that a head's largest number is scaled to; bfloat16 has float32's range
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
NARROW = {
    "bfloat16": torch.bfloat16,
    "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


class NarrowMemory:
    """Keeps keys and values narrow between passes, and gives passes what is left of them. States
    of other kinds stay as they are: a recurrent state would add up the errors.
    """

    def __init__(self, inner: MemoryPlacement, decoder: Decoder, dtype: torch.dtype) -> None:
        self.inner, self.dtype = inner, dtype
        self.caches = [kv_caches(block) for block in decoder.blocks]  # names, by layer

    def fetch(self, states: Sequence[Any], i: int) -> Any:
        """State number ``i`` on the device, wide."""
        return self.mapped(self.inner.fetch(states, i), widen)

    def keep(self, state: Any) -> Any:
        """A state that a pass has returned, narrow."""
        return self.inner.keep(self.mapped(state, self.narrow))

    def restore(self, kept: Any) -> Any:
        """A state that was kept, which is narrow."""
        return self.inner.restore(kept)

    def flush(self) -> None:
        """See MemoryPlacement."""
        self.inner.flush()

    def narrow(self, cache: dict[str, Any]) -> dict[str, Any]:
        """A KV cache with narrow keys and values."""
        kept = {name: narrow(cache[name], self.dtype) for name in KEYS_AND_VALUES}
        return cache | kept

    def mapped(
        self, state: Any, change: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> tuple[dict[str, Any], ...] | None:
        """A decoder's state with all KV caches changed."""
        if state is None:
            return None
        changed = []
        for layer, names in zip(state, self.caches, strict=True):
            caches = {name: change(layer[name]) for name in names if layer.get(name) is not None}
            changed.append(layer | caches)
        return tuple(changed)


def kv_caches(block: nn.Module) -> set[str]:
    """The names of a block's memories that are KV caches."""
    return {
        name
        for mixer in block.modules()
        if isinstance(mixer, SoftmaxAttention)
        for name, memory in mixer.memory.items()
        if isinstance(memory, Memory) and memory.is_kv_cache
    }


def narrow(tensor: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Keys or values [B, N, H, D] in a narrow type, with one scale a row and head [B, 1, H, 1] in
    their own type: ``values * scale`` is what is left of them.
    """
    tensor = tensor.detach()
    largest = tensor.abs().amax(dim=(1, 3), keepdim=True)
    if dtype not in LARGEST:
        return {"values": tensor.to(dtype), "scale": torch.ones_like(largest)}
    scale = largest / LARGEST[dtype]
    scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    values = tensor / scale
    if dtype == torch.int8:
        values = values.round().clamp(-LARGEST[dtype], LARGEST[dtype])
    return {"values": values.to(dtype), "scale": scale}


def widen(cache: dict[str, Any]) -> dict[str, Any]:
    """A KV cache with keys and values in the type that they were in."""
    kept = {}
    for name in KEYS_AND_VALUES:
        values, scale = cache[name]["values"], cache[name]["scale"]
        kept[name] = values.to(scale.dtype) * scale
    return cache | kept
