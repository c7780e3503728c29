"""One step over a decoder: new ids in, their states out, and what has been read carried along."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lswt_core.decode.cuda_graph import CudaGraphStep, Step, alike
from lswt_core.decode.rolling_kv_cache import CacheState, inference_copy, products_of
from lswt_core.device import Precision
from lswt_core.errors import NumericsError
from lswt_core.interfaces import Memory
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.pytree import detach_state, tree_leaves

Recorder: TypeAlias = Callable[[Step, Tensor, int], Callable[[Tensor, int], Tensor]]
# what has been read: None at the start, else a tree of tensors, batch row first (see
# lswt_core.plugin_api.pytree)
Past: TypeAlias = Any


class InferenceEngine:
    """Reads ids with a decoder, as training does: in segments of at most ``context`` tokens,
    memories carried along.

    Later calls see as much of earlier ones as the memories keep. Where some layer has no memory
    that keeps tokens (registers do not), a call would see nothing of the one before; the past is
    then the text itself, whose last ``context`` ids are read again from cold at every call.

    A past can be continued as often as one likes. ``begin`` reads one text on and on instead, which
    is faster; on CUDA a token is then read by operations that were recorded.
    """

    def __init__(self, decoder: Decoder, precision: Precision, seq_len: int) -> None:
        self.decoder, self.precision, self.seq_len = decoder, precision, seq_len
        self.device = next(decoder.parameters()).device
        self.record: Recorder | None = None
        if self.device.type == "cuda":
            self.record = CudaGraphStep
        self.remembers = all(
            any(m.length for m in block.modules() if isinstance(m, Memory))
            for block in decoder.blocks
        )

    @torch.no_grad()
    def __call__(self, ids: Tensor, past: Past = None) -> tuple[Tensor, Past]:
        """Ids [B, T] and what was read before -> normed states [B, T, M] and what has been read
        now. Read again from cold, only the last ``context`` ids have states.
        """
        with self.precision.autocast(self.device):
            return self.carry_on(ids, past) if self.remembers else self.read_again(ids, past)

    def carry_on(self, ids: Tensor, past: Past) -> tuple[Tensor, Past]:
        """The past is what the memories keep."""
        found = []
        for segment in ids.split(self.seq_len, dim=1):
            states, past = self.decoder(segment, past)
            past = detach_state(past)
            found.append(states)
        return torch.cat(found, dim=1), past

    def read_again(self, ids: Tensor, past: Past) -> tuple[Tensor, Past]:
        """The past is the text, [B, <= context]."""
        text = (ids if past is None else torch.cat((past, ids), dim=1))[:, -self.seq_len :]
        states, _ = self.decoder(text)
        return states[:, -ids.shape[1] :], text

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """States [B, M] -> logits [B, V] in float32 at least; raises NumericsError if one is not
        finite.
        """
        with self.precision.autocast(self.device), products_of(states):
            logits = self.twin[0].vocabulary.logits(states)
        if not logits.isfinite().all():
            raise NumericsError(
                "the model's logits are not finite: go back to an earlier checkpoint, or compute in"
                " float32"
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @cached_property
    def twin(self) -> tuple[Decoder, CacheState | None]:
        """The decoder's double for reading on, of its weights as they are now."""
        return inference_copy(self.decoder, self.precision.dtype)

    def begin(self, pads: Tensor | None = None) -> CachedSequence:
        """Texts to be read on and on. ``pads`` [B] are how many ids at the beginning of each row
        are none of its text: so prompts of different length stand in one batch.
        """
        return CachedSequence(self, pads)


class CachedSequence:
    """Texts as they are read: what their reader would give for the whole, call by call."""

    def __init__(self, reader: InferenceEngine, pads: Tensor | None) -> None:
        self.reader, self.pads = reader, None if pads is None else pads.to(reader.device)
        self.decoder, self.clock = reader.twin
        self.read = 0  # ids so far
        self.past: Past = None
        if self.clock is None:  # rings are written in place, and stay what they are
            self.past = detach_state(self.past)
        self.steady = False  # whether what is kept was last written where it was
        self.recorded: Callable[[Tensor, int], Tensor] | None = None  # the step of a single token

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """The next ids [B, T] -> normed states [B, T, M]; read again from cold, of the last
        ``context`` ids at most.
        """
        with self.reader.precision.autocast(self.reader.device):
            if not self.reader.remembers:
                return self.again(ids)
            return torch.cat(
                [self.segment(segment) for segment in ids.split(self.reader.seq_len, dim=1)], dim=1
            )

    def segment(self, ids: Tensor) -> Tensor:
        """A segment by the memories: by rings at its place in the stream, by others at the place 0."""
        first, record = 0, self.reader.record
        if self.clock is not None:
            if record is not None and self.steady and ids.shape[1] == 1:
                return self.replayed(ids, record, self.clock)
            self.clock.read = first = self.read
        before = tree_leaves(self.past)
        states, self.past = self.decoder(
            ids, self.past, self.first_visible(ids, self.read, first), first
        )
        if self.clock is None:  # rings are written in place, and stay what they are
            self.past = detach_state(self.past)
        self.steady = [id(tensor) for tensor in before] == [
            id(tensor) for tensor in tree_leaves(self.past)
        ]
        self.read += ids.shape[1]
        return states

    def replayed(self, ids: Tensor, record: Recorder, clock: CacheState) -> Tensor:
        """A single token by its recording, which the first one makes."""
        if self.recorded is None:
            with alike(self.decoder, clock):
                self.recorded = record(self.single, ids, self.read)
        states = self.recorded(ids, self.read)
        self.read += 1
        return states

    def single(self, ids: Tensor, place: Tensor) -> Tensor:
        """What is recorded: ids [B, 1] at a place that the device alone knows, read into the rings.
        Slots that nothing was read into yet stand before the text.
        """
        borders = ids.new_zeros(1, 1) if self.pads is None else self.pads[:, None]
        # what is remembered would not be there when replayed
        with self.reader.precision.autocast(self.reader.device, cache_weights=False):
            states, _ = self.decoder(ids, self.past, borders, place)
        return states

    def again(self, ids: Tensor) -> Tensor:
        """The text's end from cold."""
        text = (ids if self.past is None else torch.cat((self.past, ids), dim=1))[
            :, -self.reader.seq_len :
        ]
        self.read += ids.shape[1]
        states, _ = self.decoder(text, None, self.first_visible(text, self.read - text.shape[1], 0))
        self.past = text
        return states[:, -ids.shape[1] :]

    def first_visible(self, ids: Tensor, read: int, first: int) -> Tensor | None:
        """Where the text of every id [B, T] starts, in coordinates in which id number ``read``
        stands at ``first``: pads are a text of their own.
        """
        if self.pads is None:
            return None
        positions = torch.arange(read, read + ids.shape[1], device=ids.device)
        borders = self.pads[:, None]  # [B, 1]
        return torch.where(positions >= borders, borders, 0) - read + first
