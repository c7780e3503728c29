"""Inference with a model whose parameters are cut over ranks, all of which read the same text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lswt_core.decode.engine import Cache, InferenceEngine, compute_logits, require_finite_logits
from lswt_core.device import Precision
from lswt_core.model.train_module import TrainModule


class ShardedEngine(InferenceEngine):
    """Runs the model of a training run as it stands, gathering parameters block by block in every
    call. Slow, but no rank needs to hold the model.
    """

    def __init__(self, loss: TrainModule, precision: Precision, seq_len: int) -> None:
        super().__init__(loss.decoder, precision, seq_len)
        self.loss = loss
        self.decoder: Any = loss.hidden_states  # with its parameters in place

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """As of InferenceEngine."""
        return require_finite_logits(self.unchecked_logits(states))

    @torch.no_grad()
    def unchecked_logits(self, states: Tensor) -> Tensor:
        """As of CachedSequence."""
        return compute_logits(self.loss.logits, self.precision, states)

    def start(self, pad_lengths: Tensor | None = None) -> Any:
        """Begin a text."""
        if pad_lengths is not None:
            raise ValueError("a sharded model reads prompts of equal length only")
        return ShardedSequence(self)


class ShardedSequence:
    """A batch of texts read call by call."""

    def __init__(self, engine: ShardedEngine) -> None:
        self.engine = engine
        self.cache: Cache = None

    def __call__(self, ids: Tensor) -> Tensor:
        """The next ids [B, T] -> hidden states [B, T, M]."""
        states, self.cache = self.engine(ids, self.cache)
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Hidden states [B, M] -> logits [B, V]."""
        return self.engine.logits(states)

    def unchecked_logits(self, states: Tensor) -> Tensor:
        """As of CachedSequence."""
        return self.engine.unchecked_logits(states)
