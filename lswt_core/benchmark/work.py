"""The work that is timed, and a contender that does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.device import Precision, keep_freed_memory

GRAD_CLIP = 1.0  # global gradient norm of all contenders
LR, BETAS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 0.1  # of all contenders' AdamW
SUCCESSORS = 4  # ids that may follow an id in the training text


class Work(NamedTuple):
    """Model and batch sizes that all contenders share, and the precision they compute in."""

    batch_size: int  # of a micro-batch
    seq_len: int  # new tokens per sequence and step
    memory_length: int  # earlier tokens attended to, by contenders with memory
    vocab_size: int
    d_vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ffn: int
    trainable_embedding: bool
    precision: Precision
    device: torch.device

    @property
    def tokens(self) -> int:
        """New tokens per step."""
        return self.batch_size * self.seq_len

    def batches(self, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels [B, T] without end: random walks in which every id has few
        successors, so that there is something to learn from the first step on.
        """
        generator = torch.Generator().manual_seed(seed)
        follow = torch.randint(self.vocab_size, (self.vocab_size, SUCCESSORS), generator=generator)
        last = torch.randint(self.vocab_size, (self.batch_size,), generator=generator)
        shape = (self.seq_len, self.batch_size)
        while True:
            ids = [last]
            for choice in torch.randint(SUCCESSORS, shape, generator=generator):
                ids.append(follow[ids[-1], choice])
            last, walk = ids[-1], torch.stack(ids, dim=1).to(self.device)
            yield walk[:, :-1].contiguous(), walk[:, 1:].contiguous()


class Contender(ABC):
    """A model with its optimizer, built on the device, ready to be trained."""

    name: str
    has_memory: ClassVar[bool] = False  # does training attend to earlier segments?
    # does it make the C library keep freed memory, as our runs do?
    keeps_freed_memory: ClassVar[bool] = False
    note: ClassVar[str] = ""  # shown below the tables

    def __init__(self, work: Work) -> None:
        self.work = work

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The module that owns the parameters."""

    @abstractmethod
    def train(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward and update on [B, T]; return the loss [] without a synchronisation."""

    @abstractmethod
    def evaluate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss [] of [B, T] without gradient."""

    def prefill(self, ids: Tensor) -> Tensor | None:
        """Read a prompt [B, T] and return the next ids [B, 1]; None if the contender does not
        decode.
        """
        return None

    def decode(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1] and return the most likely next ids [B, 1]."""
        raise NotImplementedError

    def state_tensors(self) -> list[Tensor]:
        """Return what is kept between steps besides parameters: moments, memories."""
        return []

    @contextmanager
    def allocator_settings(self) -> Iterator[None]:
        """Use the allocator as this contender's users have it."""
        keep_freed_memory(self.keeps_freed_memory)
        try:
            yield
        finally:
            keep_freed_memory(False)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, Tensor)]


class TorchContender(Contender):
    """A contender in plain torch: a module, AdamW and a loss function."""

    optimizer_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        torch.manual_seed(0)
        self._model = self.build().to(work.device)
        self.parameters = [p for p in self._model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=LR,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            **self.optimizer_options,
        )

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the model on the CPU."""

    @abstractmethod
    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of labels [B, T]."""

    @property
    def model(self) -> nn.Module:
        """See Contender."""
        return self._model

    def train(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See Contender."""
        with self.work.precision.autocast(self.work.device):
            loss = self.loss(inputs, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, GRAD_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See Contender."""
        with self.work.precision.autocast(self.work.device):
            return self.loss(inputs, labels)

    def state_tensors(self) -> list[Tensor]:
        """See Contender."""
        return optimizer_tensors(self.optimizer)
