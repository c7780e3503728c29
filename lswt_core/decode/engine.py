"""Incremental forward passes of a decoder: new ids in, their hidden states out, the KV cache
carried along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lswt_core.decode.cuda_graph import CudaGraphStep, DecodeStep, fixed_shapes
from lswt_core.decode.rolling_kv_cache import CacheState, inference_copy, single_row_kernels
from lswt_core.device import Precision
from lswt_core.errors import NumericsError
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.pytree import detach_state, tree_leaves

CapturedStep: TypeAlias = Callable[[Tensor, int], Tensor]
Capture: TypeAlias = Callable[[DecodeStep, Tensor, int], CapturedStep]
# state of the memories: None at the start, else a tree of tensors [B, ...] (see
# lswt_core.plugin_api.pytree)
Cache: TypeAlias = Any


class InferenceEngine:
    """Runs a decoder as training does: in segments of at most ``seq_len`` tokens, with the memories
    carried along as cache.

    Later calls see as many earlier tokens as the layers' states keep. If the mixer of some layer
    sees none of them (registers are no state), the cache is the text itself, of which the last
    ``seq_len`` ids are recomputed at every call.

    Calling the engine returns a new cache and leaves the old one valid, so that a text can branch.
    ``start`` reads one text faster, with a rolling KV cache that is updated in place and, on CUDA,
    a CUDA graph for single tokens.
    """

    def __init__(self, decoder: Decoder, precision: Precision, seq_len: int) -> None:
        self.decoder = with_plain_blocks(decoder)
        self.precision, self.seq_len = precision, seq_len
        self.device = next(decoder.parameters()).device
        self.capture: Capture | None = None
        if self.device.type == "cuda":
            self.capture = CudaGraphStep
        self.has_memory = decoder.can_read_on

    @torch.no_grad()
    def __call__(self, ids: Tensor, cache: Cache = None) -> tuple[Tensor, Cache]:
        """Ids [B, T] and the cache -> hidden states [B, T, M] after the output norm, and the new
        cache. Without memory, only the last ``seq_len`` ids have states.
        """
        with self.precision.autocast(self.device):
            if self.has_memory:
                return self.forward_cached(ids, cache)
            return self.recompute(ids, cache)

    def forward_cached(self, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Run ids [B, T] segment by segment; the cache is the memories' state."""
        outputs = []
        for segment in ids.split(self.seq_len, dim=1):
            states, cache = self.decoder(segment, cache)
            cache = detach_state(cache)
            outputs.append(states)
        return torch.cat(outputs, dim=1), cache

    def recompute(self, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Run the end of the text without memory; the cache is its ids [B, <= seq_len]."""
        text = last_ids(cache, ids, self.seq_len)
        states, _ = self.decoder(text)
        return states[:, -ids.shape[1] :], text

    def logits(self, states: Tensor) -> Tensor:
        """Hidden states [B, M] -> logits [B, V], at least float32; raises NumericsError if one is
        not finite.
        """
        logits = compute_logits(self.decoder.vocabulary.logits, self.precision, states)
        return require_finite_logits(logits)

    def start(self, pad_lengths: Tensor | None = None) -> CachedSequence:
        """Begin a batch of texts with the current weights. ``pad_lengths`` [B] is how many ids at
        the beginning of each row are padding, for prompts of different length.
        """
        return CachedSequence(self, pad_lengths)


class CachedSequence:
    """A batch of texts read call by call, with the hidden states that the engine would give.

    The weights are those at the time of ``InferenceEngine.start``: they are converted to the
    compute precision once.
    """

    def __init__(self, engine: InferenceEngine, pad_lengths: Tensor | None) -> None:
        self.engine, self.pad_lengths = engine, None
        if pad_lengths is not None:
            self.pad_lengths = pad_lengths.to(engine.device)
        self.decoder, self.cache_state = inference_copy(engine.decoder, engine.precision.dtype)
        self.n_read = 0  # ids so far
        self.cache: Cache = None
        # whether the last call left every tensor of the cache where it was, as replay requires
        self.is_in_place = False
        self.captured: CapturedStep | None = None  # the step of a single token

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """The next ids [B, T] -> hidden states [B, T, M]; without memory, those of the last
        ``seq_len`` ids at most.
        """
        with self.engine.precision.autocast(self.engine.device):
            if not self.engine.has_memory:
                return self.recompute(ids)
            segments = ids.split(self.engine.seq_len, dim=1)
            return torch.cat([self.read_segment(segment) for segment in segments], dim=1)

    def logits(self, states: Tensor) -> Tensor:
        """Hidden states [B, M] -> logits [B, V], as ``InferenceEngine.logits``."""
        return require_finite_logits(self.unchecked_logits(states))

    @torch.no_grad()
    def unchecked_logits(self, states: Tensor) -> Tensor:
        """``logits`` that may not be finite: finding out waits for the device."""
        return compute_logits(self.decoder.vocabulary.logits, self.engine.precision, states)

    def read_segment(self, ids: Tensor) -> Tensor:
        """Run a segment. With rolling KV caches its positions count from the beginning of the text,
        else from the beginning of the segment.
        """
        capture, position = self.engine.capture, 0
        if self.cache_state is not None:
            if capture is not None and self.is_in_place and ids.shape[1] == 1:
                return self.replay(ids, capture, self.cache_state)
            self.cache_state.n_read = position = self.n_read
        before = tree_leaves(self.cache)
        first_visible = self.first_visible(ids, self.n_read, position)
        states, self.cache = self.decoder(ids, self.cache, first_visible, position)
        if self.cache_state is None:  # rolling KV caches are updated in place: nothing to copy
            self.cache = detach_state(self.cache)
        after = tree_leaves(self.cache)
        self.is_in_place = [id(tensor) for tensor in before] == [id(tensor) for tensor in after]
        self.n_read += ids.shape[1]
        return states

    def replay(self, ids: Tensor, capture: Capture, cache_state: CacheState) -> Tensor:
        """Run ids [B, 1] by the captured step, which is captured at the first call."""
        if self.captured is None:
            with fixed_shapes(self.decoder, cache_state):
                self.captured = capture(self.decode_step, ids, self.n_read)
        states = self.captured(ids, self.n_read)
        self.n_read += 1
        return states

    def decode_step(self, ids: Tensor, position: Tensor) -> Tensor:
        """The step to capture: ids [B, 1] at a position [] on the device. Empty cache slots have
        positions below the first visible one.
        """
        first_visible = ids.new_zeros(1, 1)
        if self.pad_lengths is not None:
            first_visible = self.pad_lengths[:, None]
        # autocast must not cache weights: the cached copies would be gone at replay
        with self.engine.precision.autocast(self.engine.device, cache_weights=False):
            states, _ = self.decoder(ids, self.cache, first_visible, position)
        return states

    def recompute(self, ids: Tensor) -> Tensor:
        """Run the end of the text without memory."""
        self.cache = text = last_ids(self.cache, ids, self.engine.seq_len)
        self.n_read += ids.shape[1]
        first_visible = self.first_visible(text, self.n_read - text.shape[1], 0)
        states, _ = self.decoder(text, None, first_visible)
        return states[:, -ids.shape[1] :]

    def first_visible(self, ids: Tensor, n_before: int, position: int) -> Tensor | None:
        """Return the first position [B, T] that each of ids [B, T] attends to, so that padding and
        text do not see each other; None without padding. ``n_before`` ids were read before these,
        whose first one is at ``position``.
        """
        if self.pad_lengths is None:
            return None
        index = torch.arange(n_before, n_before + ids.shape[1], device=ids.device)
        start = self.pad_lengths[:, None]  # [B, 1]
        return torch.where(index >= start, start, 0) - n_before + position


def last_ids(before: Tensor | None, ids: Tensor, length: int) -> Tensor:
    """Return the last ``length`` ids of a text [B, T_before] continued by ids [B, T]."""
    if before is not None:
        ids = torch.cat((before, ids), dim=1)
    return ids[:, -length:]


@torch.no_grad()
def compute_logits(
    head: Callable[[Tensor], Tensor], precision: Precision, states: Tensor
) -> Tensor:
    """Hidden states [B, M] -> logits [B, V], at least float32."""
    with precision.autocast(states.device), single_row_kernels(states):
        logits = head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def require_finite_logits(logits: Tensor, finite: bool | None = None) -> Tensor:
    """The logits themselves. Raises NumericsError if one is not finite; ``finite`` says so where it
    was read from the device already.
    """
    if finite is None:
        finite = bool(logits.isfinite().all())
    if not finite:
        raise NumericsError(
            "the model's logits are not finite: go back to an earlier checkpoint, or compute in"
            " float32"
        )
    return logits


def with_plain_blocks(decoder: Decoder) -> Decoder:
    """The decoder, or if its blocks are compiled a shallow copy that shares their parts, whose
    blocks are not: a text grows, and compiled blocks would be compiled anew for every length.
    """
    if not any(block._compiled_call_impl is not None for block in decoder.blocks):
        return decoder
    plain = copy.copy(decoder)
    plain._modules = dict(decoder._modules)
    plain.blocks = nn.ModuleList(map(copy.copy, decoder.blocks))  # copies are not compiled
    return plain
