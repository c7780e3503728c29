"""What is measured: the work, and a subject that does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.device import Precision, keep_freed_memory

CLIP = 1.0  # of the global gradient norm, by everyone
LR, BETAS, DECAY = 3e-4, (0.9, 0.95), 0.1  # of everyone's AdamW
SUCCESSORS = 4  # ids that may follow an id in the text everyone learns


class Work(NamedTuple):
    """Sizes that every subject takes over, and the numbers it computes in."""

    rows: int
    seq_len: int  # new tokens a row reads per step
    remembered: int  # tokens before them that are attended to, by those who can
    vocab_size: int
    d_vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ffn: int
    trained_table: bool  # whether the word embeddings learn
    precision: Precision
    device: torch.device

    @property
    def tokens(self) -> int:
        """New tokens of a step."""
        return self.rows * self.seq_len

    def text(self, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels [B, T], step after step, without end: a random walk in which every id
        has few successors, so that there is something to learn from the beginning.
        """
        generator = torch.Generator().manual_seed(seed)
        follow = torch.randint(self.vocab_size, (self.vocab_size, SUCCESSORS), generator=generator)
        now = torch.randint(self.vocab_size, (self.rows,), generator=generator)
        while True:
            ids = [now]
            for choice in torch.randint(SUCCESSORS, (self.seq_len, self.rows), generator=generator):
                ids.append(follow[ids[-1], choice])
            now, walk = ids[-1], torch.stack(ids, dim=1).to(self.device)
            yield walk[:, :-1].contiguous(), walk[:, 1:].contiguous()


class Contender(ABC):
    """A model, its optimizer and its way through the work. Built on the device, ready to be
    trained.
    """

    name: str
    remembers: ClassVar[bool] = False  # does training attend to earlier segments?
    # does it tell the C library to keep freed memory, as a run of ours does?
    keeps_freed: ClassVar[bool] = False
    note: ClassVar[str] = ""  # what is worth knowing about it

    def __init__(self, work: Work) -> None:
        self.work = work

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """What has the parameters."""

    @abstractmethod
    def train(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward and update on [B, T]; the loss [], still on the device."""

    @abstractmethod
    def evaluate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss [] of [B, T] without gradient."""

    def prompt(self, ids: Tensor) -> Tensor | None:
        """Read [B, T] and be ready to decode; the first next ids [B, 1]. None: this subject does
        not decode.
        """
        return None

    def decode(self, ids: Tensor) -> Tensor:
        """Read [B, 1] and give the likeliest next [B, 1]."""
        raise NotImplementedError

    def held(self) -> list[Tensor]:
        """What the subject holds between steps besides parameters: moments, memories."""
        return []

    @contextmanager
    def as_its_users_run_it(self) -> Iterator[None]:
        """The allocator as this subject's users have it."""
        keep_freed_memory(self.keeps_freed)
        try:
            yield
        finally:
            keep_freed_memory(False)


class Trained(Contender):
    """A subject of plain torch: a module, AdamW, a loss function."""

    optimizer_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        torch.manual_seed(0)
        self._model = self.build().to(work.device)
        self.parameters = [p for p in self._model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LR, betas=BETAS, weight_decay=DECAY, **self.optimizer_options
        )

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, on the CPU."""

    @abstractmethod
    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of labels [B, T]."""

    @property
    def model(self) -> nn.Module:
        """See Subject."""
        return self._model

    def train(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See Subject."""
        with self.work.precision.autocast(self.work.device):
            loss = self.loss(inputs, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """See Subject."""
        with self.work.precision.autocast(self.work.device):
            return self.loss(inputs, labels)

    def held(self) -> list[Tensor]:
        """Moments."""
        return [
            t
            for state in self.optimizer.state.values()
            for t in state.values()
            if isinstance(t, Tensor)
        ]
