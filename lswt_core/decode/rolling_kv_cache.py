"""Rolling KV cache for decoding: a copy of the decoder with weights in the compute precision, whose
memories store encoded keys and values in ring buffers, so that each token costs the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.interfaces import (
    Block,
    Head,
    KeyValue,
    KVProjection,
    Memory,
    Mixer,
    PositionalEncoding,
    State,
)
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.plain_modules import is_ordinary
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention


class CacheState:
    """Fill level of the caches, on the host so that no device has to be synchronised."""

    def __init__(self) -> None:
        self.n_read = 0  # tokens so far
        # attend to empty slots as well, so that shapes do not depend on the fill level
        self.use_all_slots = False


class RollingKVCache(Memory):
    """A memory's keys and values, encoded at their absolute positions, in a ring buffer that is
    updated in place.

    The buffer has one slot more than the memory is long: a single new token is written first and
    then attended to in its slot, without a copy. A state can be continued only once.
    """

    def __init__(
        self, memory: Memory, positional: PositionalEncoding, cache_state: CacheState
    ) -> None:
        nn.Module.__init__(self)
        self.length, self.window = memory.length, memory.window
        self.positional, self.cache_state = positional, cache_state

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Return the cached and the new tokens' keys and values, and the state. A single new token
        is returned together with the cached ones.
        """
        *others, new = project(x, positions)
        k, v = self.positional.rotate(new.k, positions), new.v
        if state is None:
            state = self.allocate(k)
        if k.shape[1] == 1:
            self.write(state, k, v, positions)
            return [*others, self.filled_slots(state, positions)], state
        cached = self.cached_tokens(state, positions)  # a copy, before slots are overwritten
        self.write(state, k, v, positions)
        return [*others, *cached, KeyValue(k, v, positions, encoded=True)], state

    @property
    def n_slots(self) -> int:
        """Slots of the ring buffer."""
        return self.length + 1

    def allocate(self, k: Tensor) -> dict[str, Tensor]:
        """Return empty buffers [B, H, slots, D] for keys [B, T, H, D]: heads come first, so that
        what attention multiplies is contiguous.
        """
        shape = (k.shape[0], k.shape[2], self.n_slots, k.shape[3])
        return {"k": k.new_zeros(shape), "v": k.new_zeros(shape)}

    def write(self, state: dict[str, Tensor], k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write the newest of k, v [B, T, H, D] to the slots of their positions [T]."""
        newest = slice(max(0, k.shape[1] - self.n_slots), None)
        slots = positions[newest] % self.n_slots
        state["k"].index_copy_(2, slots, k[:, newest].transpose(1, 2).to(state["k"].dtype))
        state["v"].index_copy_(2, slots, v[:, newest].transpose(1, 2).to(state["v"].dtype))

    def filled_slots(self, state: dict[str, Tensor], positions: Tensor) -> KeyValue:
        """Return all filled slots in buffer order, the token at ``positions`` [1] included."""
        filled = self.n_slots
        if not self.cache_state.use_all_slots:
            filled = min(self.cache_state.n_read + 1, filled)
        slots = torch.arange(filled, device=positions.device)
        # newest position that falls into each slot; below 0 if it is empty
        slot_positions = positions - (positions - slots) % self.n_slots
        k, v = (state[name][:, :, :filled].transpose(1, 2) for name in ("k", "v"))
        return KeyValue(k, v, slot_positions, encoded=True)

    def cached_tokens(self, state: dict[str, Tensor], positions: Tensor) -> list[KeyValue]:
        """Return a copy of the last ``length`` tokens in text order; [] if there are none."""
        n_read = self.cache_state.n_read
        count = min(n_read, self.length)
        if not count:
            return []
        cached = torch.arange(n_read - count, n_read, device=positions.device)
        slots = cached % self.n_slots
        k, v = (state[name].index_select(2, slots).transpose(1, 2) for name in ("k", "v"))
        return [KeyValue(k, v, cached, encoded=True)]


@contextmanager
def single_row_kernels(x: Tensor) -> Iterator[None]:
    """Disable oneDNN while a single row x [..., M] is multiplied on a CPU: its kernels, made for
    many rows, reach half of the memory bandwidth with one.
    """
    enabled = torch._C._get_mkldnn_enabled()
    is_single_row = x.device.type == "cpu" and x.numel() == x.shape[-1]
    torch._C._set_mkldnn_enabled(enabled and not is_single_row)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class DecodeLinear(nn.Linear):
    """A linear layer for inputs that often are a single row."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        with single_row_kernels(x):
            return super().forward(x)


def inference_copy(decoder: Decoder, dtype: torch.dtype) -> tuple[Decoder, CacheState | None]:
    """Return a copy of the decoder that computes the same, and the state of its rolling KV caches;
    None if some memory or positional encoding does not allow one.

    Parameters are shared, except those that autocast would convert to ``dtype`` at every call:
    they are converted once.
    """
    copied: Any = copy_module(decoder, dtype)
    if not supports_rolling_cache(decoder):
        return copied, None
    cache_state = CacheState()
    for block in copied.blocks:
        positional = copied.positional_of(block)
        for mixer in mixers_of(block):
            for name, memory in mixer.memory.items():
                if memory.length:
                    encoding = mixer.encoding_of(positional)
                    rolling = RollingKVCache(memory, encoding, cache_state)
                    mixer.memory._modules[name] = rolling
    return copied, cache_state


def copy_module(
    module: nn.Module, dtype: torch.dtype, parent: nn.Module | None = None
) -> nn.Module:
    """Return a copy with the same parameters; weights of linear layers and of the head are
    converted to ``dtype``.
    """
    copied = copy.copy(module)
    copied._modules = {}
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else copy_module(child, dtype, module)
    copied._parameters = dict(module._parameters)
    if type(module) is nn.Linear:
        copied.__class__ = DecodeLinear
    if isinstance(module, nn.Linear) or isinstance(parent, Head):
        for name, parameter in module._parameters.items():
            copied._parameters[name] = convert_parameter(parameter, dtype)
    return copied


def convert_parameter(parameter: nn.Parameter | None, dtype: torch.dtype) -> nn.Parameter | None:
    """Return a parameter in bfloat16 or float16; itself if it is already, for a wider ``dtype``, or
    if it is quantised.
    """
    if parameter is None or parameter.dtype == dtype:
        return parameter
    if dtype not in (torch.bfloat16, torch.float16) or not is_ordinary(parameter):
        return parameter
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


def supports_rolling_cache(decoder: Decoder) -> bool:
    """Return whether every layer's cached keys stay valid as the text goes on."""
    embed = type(decoder.positional).embed
    if embed is not PositionalEncoding.embed:
        return False
    return all(layer_supports_rolling_cache(block, decoder) for block in decoder.blocks)  # type: ignore[arg-type]


def layer_supports_rolling_cache(block: Block, decoder: Decoder) -> bool:
    """Return whether all mixers of a layer are softmax attention whose memories keep tokens as a KV
    cache, with a positional encoding that encodes each key by its own position alone.
    """
    positional = decoder.positional_of(block)
    mixers = mixers_of(block)
    return bool(mixers) and all(
        isinstance(mixer, SoftmaxAttention)
        and keeps_kv_cache(mixer)
        and encodes_each_key_alone(mixer, mixer.encoding_of(positional))
        for mixer in mixers
    )


def mixers_of(block: nn.Module) -> list[Any]:
    """Return the mixers of a block."""
    return [module for module in block.modules() if isinstance(module, Mixer)]


def keeps_kv_cache(mixer: SoftmaxAttention) -> bool:
    """Return whether a mixer has memories that keep tokens, all of them as a KV cache, and reads
    them in the usual way. Layers above must not read them: a ring buffer's order is not the text's.
    """
    memories = [memory for memory in mixer.memory.values() if isinstance(memory, Memory)]
    keeping = [memory for memory in memories if memory.length]
    is_usual = (
        type(mixer).key_values is SoftmaxAttention.key_values
        and type(mixer).carry_up is SoftmaxAttention.carry_up
    )
    return is_usual and bool(keeping) and all(memory.is_kv_cache for memory in keeping)


def encodes_each_key_alone(mixer: SoftmaxAttention, positional: PositionalEncoding) -> bool:
    """Return whether a key is encoded by its own position alone, and stays valid as the text goes
    on.
    """
    usual = (
        type(mixer).encode is SoftmaxAttention.encode
        and type(positional).encode is PositionalEncoding.encode
        and type(positional).block_biases is PositionalEncoding.block_biases
    )
    return usual and positional.cacheable_keys
