"""A small model and its trainer, for checks of whole updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lswt_core.acceptance.item import require
from lswt_core.benchmark.ours import work_of
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.interfaces import Batch
from lswt_core.model.build import build_model, materialise
from lswt_core.model.components import build_optimizer, build_schedule
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.pytree import tree_leaves
from lswt_core.plugin_api.sharded_tensor import full_tensor
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.train.start import step_context
from lswt_core.train.trainer import Trainer, TrainerComponents

# Two layers with every kind of memory, as long as a segment: from the second one on it is full.
TABLES: dict[str, dict[str, Any]] = {
    "model": {"d_model": 128, "n_layers": 2, "n_heads": 2},
    "embedding": {"vocab_size": 512, "d_vocab": 96, "warm_start": "none"},
    "memory": {
        "registers": {"count": 4},
        "xl": {"use": "xl-cache", "length": 64},
    },
    "loss": {"simctg": {"weight": 0.1}},
    "optimizer": {"use": "adamw", "lr": 1e-3},
    "schedule": {"warmup_steps": 0},
    "train": {
        "batch_size": 4,
        "seq_len": 64,
        "micro_batch_size": 2,
        "steps": 8,
        "precision": "float32",
        "compile": "none",
    },
    "data": {"use": "stdlib"},
    "tokenizer": {"use": "bytes"},
}


def small_recipe(registry: Registry, **train: Any) -> Recipe:
    """The recipe of the small model, with other values in [train]."""
    tables = TABLES | {"train": TABLES["train"] | train}
    return Recipe.from_dict(tables, where="the acceptance's model", registry=registry)


class Walk:
    """Batches of a random walk over the vocabulary, in host memory as a run's are; implements
    BatchStream.
    """

    def __init__(self, recipe: Recipe, registry: Registry, device: torch.device) -> None:
        work = work_of(recipe, registry, torch.device("cpu"))
        self.batches = work._replace(batch_size=recipe.train.batch_size).batches()
        self.pinned = device.type == "cuda"
        self.advance()

    def segment(self, ahead: int = 0) -> Batch:
        """The present batch."""
        return self.batch

    def advance(self) -> None:
        """Move on to the next."""
        batch = Batch(*next(self.batches))
        self.batch = batch.map(Tensor.pin_memory) if self.pinned else batch


class Logged(list[dict[str, float]]):
    """Metrics, kept in a list; implements MetricsSink."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the metrics of a step."""
        self.append(dict(values))


class Training(NamedTuple):
    """A trainer and what it logged."""

    trainer: Trainer
    metrics: Logged

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        world: World,
        shard: Callable[[nn.Module], None] | None = None,
    ) -> Training:
        """Build a recipe's trainer, as a run does."""
        registry, metrics = Registry(), Logged()
        precision = Precision.choose(recipe.train.precision, world.device)
        built = build_model(recipe, registry, device=world.device, dtype=precision.dtype)
        materialise(built.loss, recipe, world.device, shard)
        components = TrainerComponents(
            recipe.train,
            step_context(built, recipe.train, world, precision, lambda: False),
            build_optimizer(recipe, registry, built.loss),
            build_schedule(recipe, registry),
            Walk(recipe, registry, world.device),
            metrics,
            Console(silent=True),
        )
        return cls(Trainer(components), metrics)

    def advance(self, steps: int) -> list[float]:
        """Make updates; returns the losses of all so far."""
        for _ in range(steps):
            self.trainer.advance()
        return [values["loss"] for values in self.metrics]

    @property
    def loss(self) -> TrainModule:
        """The model."""
        return self.trainer.context.loss

    def weights(self) -> dict[str, Tensor]:
        """Whole copies of the parameters."""
        named = self.loss.named_parameters()
        return {name: full_tensor(p.detach()).clone() for name, p in named}

    def memories(self) -> list[Tensor]:
        """The memory states of all micro-batches, on the host."""
        self.trainer.context.placement.flush()
        return [tensor.cpu() for tensor in tree_leaves(tuple(self.trainer.memory))]


def require_close(name: str, one: Any, other: Any, bound: float) -> float:
    """Raise Unmet unless two tensors, or lists of numbers, differ by at most ``bound`` relative to
    the norm; returns the difference.
    """
    a, b = (torch.as_tensor(value).double() for value in (one, other))
    error = float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float32).tiny))
    require(error <= bound, f"{name} differ by {error:.2g} of their norm, allowed is {bound:.2g}")
    return error
