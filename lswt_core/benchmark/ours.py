"""A recipe as a subject: the same modules, step and optimizer as a run of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.benchmark.work import Contender, Work
from lswt_core.decode import InferenceEngine
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import NumericsError
from lswt_core.interfaces import Batch, Memory
from lswt_core.model.build import assemble, materialise
from lswt_core.model.components import build_optimizer
from lswt_core.model.parameters import trainable
from lswt_core.plugin_api.pytree import kept, tensors
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.train.step import Step, StepContext
from lswt_core.train.update import apply_update, hessian_update_is_due


def work_of(recipe: Recipe, registry: Registry, device: torch.device) -> Work:
    """The sizes of a recipe's step: one micro-batch, and an update."""
    from lswt_core.model.components import dimensions, memories_of

    dims, train = dimensions(recipe), recipe.train
    return Work(
        rows=train.micro_batch_size or train.batch_size,
        seq_len=train.seq_len,
        remembered=max((memory.length for memory in memories_of(recipe, registry)), default=0),
        vocab_size=recipe.embedding.vocab_size,
        d_vocab=recipe.embedding.d_vocab,
        d_model=dims.d_model,
        n_layers=dims.n_layers,
        n_heads=dims.n_heads,
        d_ffn=dims.d_ffn,
        trained_table=recipe.embedding.trainable,
        precision=Precision.choose(train.precision, device),
        device=device,
    )


class Ours(Contender):
    """A recipe."""

    keeps_freed = True

    def __init__(self, work: Work, recipe: Recipe, registry: Registry, name: str) -> None:
        super().__init__(work)
        self.name, self.recipe = name, recipe
        built = assemble(recipe, registry, device=work.device, dtype=work.precision.dtype)
        self.loss, self.attention = built.loss, built.attention
        materialise(self.loss, recipe, work.device)
        self.optimizer = build_optimizer(recipe, registry, self.loss)
        self.context = StepContext(
            self.loss,
            World(device=work.device),
            work.precision,
            recipe.train.seed,
            range(work.rows),
            work.rows,
        )
        self.state: Any = None  # of training
        self.read: Any = None  # of evaluation
        self.steps = 0
        self.remembers = any(isinstance(m, Memory) and m.length for m in self.loss.modules())  # type: ignore[misc]

    @property
    def model(self) -> nn.Module:
        """See Subject."""
        return self.loss

    def train(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """A step as a run takes it, curvature included when it is due."""
        optimizer = self.optimizer
        due = hessian_update_is_due(optimizer, self.steps)
        sampling = optimizer.fraction if due and optimizer.shares_forward else 0.0
        step = Step(
            self.context, Batch(inputs, labels), [self.state], self.steps, sampling=sampling
        )
        update = apply_update(
            optimizer,
            step,
            trainable(self.loss),
            update_hessian=due,
            grad_clip=self.recipe.train.grad_clip,
        )
        if not update.curvature_is_finite:
            raise NumericsError(f"{self.name}: the curvature estimate is not finite")
        self.steps += 1
        self.state = step.next_memory[0]
        return step.results[0].loss

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """A segment of a held-out text, memory carried along."""
        with self.work.precision.autocast(self.work.device):
            result = self.loss(Batch(inputs, labels), self.read)
        self.read = kept(result.state)
        return result.loss

    def prompt(self, ids: Tensor) -> Tensor | None:
        """See Subject."""
        self.reader = InferenceEngine(self.loss.decoder, self.work.precision, self.work.seq_len)
        self.reading = self.reader.begin()
        states = self.reading(ids)
        return self.reader.logits(states[:, -1]).argmax(-1, keepdim=True)

    def decode(self, ids: Tensor) -> Tensor:
        """See Subject."""
        states = self.reading(ids)
        return self.reader.logits(states[:, -1]).argmax(-1, keepdim=True)

    def held(self) -> list[Tensor]:
        """Moments and memories."""
        moments = [
            t
            for state in self.optimizer.state.values()
            for t in state.values()
            if isinstance(t, Tensor)
        ]
        return moments + list(tensors(self.state))
