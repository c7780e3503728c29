"""A recipe as a contender: the same modules, step and optimizer as a run of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.benchmark.work import Contender, Work, optimizer_tensors
from lswt_core.decode import InferenceEngine
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import NumericsError
from lswt_core.interfaces import Batch
from lswt_core.model.build import build_model, materialise
from lswt_core.model.components import build_memories, build_optimizer, dims_of
from lswt_core.model.parameters import trainable_parameters
from lswt_core.plugin_api.pytree import detach_state, tree_leaves
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.train.step import Step
from lswt_core.train.step_context import StepContext
from lswt_core.train.update import apply_update, hessian_update_is_due


def work_of(recipe: Recipe, registry: Registry, device: torch.device) -> Work:
    """Return the sizes of a recipe's step on one micro-batch."""
    dims, train, world = dims_of(recipe), recipe.train, World(device=device)
    memories = build_memories(recipe, registry)
    return Work(
        batch_size=world.micro_batch_size(train.batch_size, train.micro_batch_size),
        seq_len=train.seq_len,
        memory_length=max((memory.length for memory in memories), default=0),
        vocab_size=recipe.embedding.vocab_size,
        d_vocab=recipe.embedding.d_vocab,
        d_model=dims.d_model,
        n_layers=dims.n_layers,
        n_heads=dims.n_heads,
        d_ffn=dims.d_ffn,
        trainable_embedding=recipe.embedding.trainable,
        precision=Precision.choose(train.precision, device),
        device=device,
    )


class Ours(Contender):
    """A recipe, trained as a run trains it."""

    keeps_freed_memory = True

    def __init__(self, work: Work, recipe: Recipe, registry: Registry, name: str) -> None:
        super().__init__(work)
        self.name, self.recipe = name, recipe
        built = build_model(recipe, registry, device=work.device, dtype=work.precision.dtype)
        self.loss, self.attention = built.loss, built.attention
        materialise(self.loss, recipe, work.device)
        self.optimizer = build_optimizer(recipe, registry, self.loss)
        self.context = StepContext(
            self.loss,
            World(device=work.device),
            work.precision,
            recipe.train.seed,
            range(work.batch_size),
            work.batch_size,
        )
        self.state: Any = None  # of the memories in training
        self.eval_state: Any = None
        self.steps = 0
        self.has_memory = self.loss.decoder.keeps_state  # type: ignore[misc]

    @property
    def model(self) -> nn.Module:
        """See Contender."""
        return self.loss

    def train(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """A step as in a run, with a Hessian estimate when it is due."""
        optimizer = self.optimizer
        due = hessian_update_is_due(optimizer, self.steps)
        sampling = optimizer.fraction if due and optimizer.shares_forward else 0.0
        step = Step(
            self.context, Batch(inputs, labels), [self.state], self.steps, sampling=sampling
        )
        update = apply_update(
            optimizer,
            step,
            trainable_parameters(self.loss),
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
        """Loss of the next segment of a held-out text, with memory."""
        with self.work.precision.autocast(self.work.device):
            result = self.loss(Batch(inputs, labels), self.eval_state)
        self.eval_state = detach_state(result.state)
        return result.loss

    def prefill(self, ids: Tensor) -> Tensor | None:
        """See Contender."""
        engine = InferenceEngine(self.loss.decoder, self.work.precision, self.work.seq_len)
        self.sequence = engine.start()
        return self.decode(ids)

    def decode(self, ids: Tensor) -> Tensor:
        """See Contender."""
        states = self.sequence(ids)
        return self.sequence.logits(states[:, -1]).argmax(-1, keepdim=True)

    def state_tensors(self) -> list[Tensor]:
        """See Contender."""
        return [*optimizer_tensors(self.optimizer), *tree_leaves(self.state)]
