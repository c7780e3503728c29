"""Peak memory of one process, measured on the meta device: nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from lswt_core.budget.batch_memory import count_bytes
from lswt_core.budget.rank_model import FLOAT32_BYTES, NO_MODEL, RankModel, shape_key
from lswt_core.checkpoint.values import outline
from lswt_core.device import available_memory
from lswt_core.distributed.world import World
from lswt_core.errors import ResourceError
from lswt_core.interfaces import CrossEntropy, Optimizer, WeightAverage
from lswt_core.model.parameters import trainable_parameters
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.token_scores import TILE
from lswt_core.recipe import Recipe
from lswt_core.reporting.units import format_bytes

SHOWN_PARTS = 4  # of a run that does not fit
STREAMED_MICRO_BATCHES = 3  # whose memories are on the device at once
SAVED = ("weights", "average", "optimizer")  # parts that a checkpoint has


class MemoryBudget(NamedTuple):
    """Memory of a recipe for any batch size and any mesh of ranks."""

    # part -> bytes of a single process; "memories" and "activations" are per sequence; what is
    # unknown is absent
    parts: dict[str, int]
    recipe: Recipe
    logits: Callable[[int], int]  # tokens -> bytes that their cross-entropy holds at once
    stream_width: int  # numbers of a token in the residual stream
    ranks: RankModel = NO_MODEL
    has_host: bool = False  # the device's memory is not the host's

    def of_process(self, world: World, micro: int | None = None) -> dict[str, int]:
        """Return the bytes of one process by part, their "total", and what is "available" on its
        device, for micro-batches of ``micro`` sequences (default: the recipe's). The total is of
        what is known.
        """
        parts = self.needed(world, micro)
        return parts | {"total": sum(parts.values()), "available": available_memory(world.device)}

    def needed(self, world: World, micro: int | None = None) -> dict[str, int]:
        """Return the bytes of one process on its device by part. Raises ResourceError if ranks
        cannot share the model.
        """
        train = self.recipe.train
        micro = micro or world.micro_batch_size(train.batch_size, train.micro_batch_size)
        parts = dict(self.parts)
        if world.size > 1:
            parts = self.of_rank(world.n_shards(train.shard))
        if "activations" in self.parts:
            parts["memories"] = self.memories(world, micro)
            parts["activations"] = self.activations() * micro
        parts["logits"] = self.logits(micro * train.seq_len)
        if not self.has_host and (held := self.checkpoint_copy(world)):
            parts["checkpoint"] = held
        return parts

    def of_rank(self, shards: int) -> dict[str, int]:
        """Return the bytes of one of several ranks that do not grow with the batch."""
        return self.ranks.of_rank(self.parts, shards, self.recomputes)

    @property
    def recomputes(self) -> bool:
        """Whether blocks are run again in the backward pass."""
        return self.recipe.train.activation_checkpointing != "none"

    @property
    def streams(self) -> bool:
        """Whether memories live on the host and pass through the device."""
        return self.has_host and self.recipe.train.memory_device == "host"

    def memories(self, world: World, micro: int) -> int:
        """Return the bytes of memories on the device: this step's and the next's; if streamed, of
        the micro-batch at work, the next one's and what the last one left.
        """
        rows = 2 * len(world.rows(self.recipe.train.batch_size))
        if self.streams:
            rows = min(rows, STREAMED_MICRO_BATCHES * micro)
        return self.parts["memories"] * rows

    def checkpoint_copy(self, world: World) -> int:
        """Return the bytes of a process's pieces of a checkpoint in host memory, from which it is
        written while training goes on; 0 if training waits.
        """
        wanted = self.recipe.checkpoint.asynchronous
        if wanted is False or (wanted == "auto" and not self.has_host):
            return 0
        parts = self.parts
        if world.size > 1:
            parts = self.of_rank(world.n_shards(self.recipe.train.shard))
        rows = len(world.rows(self.recipe.train.batch_size))
        return sum(parts.get(name, 0) for name in SAVED) + self.saved_memories(rows)

    def checkpoint_bytes(self) -> int:
        """Return the bytes of a checkpoint, of all ranks together."""
        memories = self.saved_memories(self.recipe.train.batch_size)
        return sum(self.parts.get(name, 0) for name in SAVED) + memories

    def saved_memories(self, rows: int) -> int:
        """Return the bytes of the memories of some rows in a checkpoint; of the tokens that they
        can be rebuilt from, which are few, none.
        """
        if self.recipe.checkpoint.memory == "replay":
            return 0
        return self.parts.get("memories", 0) * rows

    def of_host(self, world: World) -> dict[str, int]:
        """Return the bytes of one process in the host's memory beside a device of its own."""
        if not self.has_host:
            return {"memories": 0, "checkpoint": 0, "total": 0}
        rows = len(world.rows(self.recipe.train.batch_size))
        memories = 2 * rows * self.parts.get("memories", 0) if self.streams else 0
        held = self.checkpoint_copy(world)
        return {"memories": memories, "checkpoint": held, "total": memories + held}

    def with_train(self, **changes: object) -> MemoryBudget:
        """Return the budget of a recipe with another [train] table."""
        recipe = copy(self.recipe)
        recipe.train = recipe.train.model_copy(update=changes)
        return self._replace(recipe=recipe)

    def activations(self) -> int:
        """Return the bytes per sequence that autograd saves; with activation checkpointing, the
        input of every block and what one recomputed block saves.
        """
        n_layers, train = self.recipe.model.n_layers, self.recipe.train
        if not self.recomputes:
            return self.parts["activations"]
        inputs = n_layers * train.seq_len * self.stream_width * FLOAT32_BYTES
        return inputs + self.parts["activations"] // n_layers

    def largest_micro(self, world: World, available: int | None = None) -> int:
        """Return the largest micro-batch size that fits, a divisor of the process's batch size; 0
        if none does.
        """
        rows = len(world.rows(self.recipe.train.batch_size))
        if available is None:
            available = available_memory(world.device)
        return self.largest_fitting(world, rows, available)

    def largest_fitting(self, world: World, most: int, available: int) -> int:
        """Return the largest micro-batch size up to ``most`` that fits; 0 if none does."""
        rows = len(world.rows(self.recipe.train.batch_size))
        for micro in range(most, 0, -1):
            if rows % micro == 0 and sum(self.needed(world, micro).values()) <= available:
                return micro
        return 0


def parameter_bytes(loss: TrainModule, optimizer: Optimizer, half: int) -> dict[str, int]:
    """Return the bytes of weights, gradients and weights cast to the compute precision, of ``half``
    bytes per number. Weights and gradients are float32, a frozen embedding table float16.
    """
    weights = list(loss.parameters())
    return {
        "weights": count_bytes(weights),
        "gradients": count_bytes(trainable_parameters(loss))
        * (2 if optimizer.shares_forward else 1),
        # of one micro-batch
        "cast_weights": half * sum(w.numel() for w in weights if w.dtype.itemsize != half),
    }


def average_bytes(loss: TrainModule, average: WeightAverage) -> dict[str, int]:
    """Return the bytes of an average of the weights, in float32; nothing if none is kept."""
    if not average.is_active:
        return {}
    return {"average": FLOAT32_BYTES * sum(p.numel() for p in trainable_parameters(loss))}


def logits_bytes(scoring: CrossEntropy, device: str, table: Tensor, half: int, tokens: int) -> int:
    """Return the bytes of the logits that exist at once, and of two float32 copies of the tile in
    work.
    """
    logits = scoring.peak_logits(device, tokens, table)
    return half * logits + 2 * FLOAT32_BYTES * min(logits, TILE)


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the optimizer's state, measured by one step on the meta device.

    Raises CheckpointError if a checkpoint cannot hold the state.
    """
    return sum(optimizer_states(optimizer).values())


def optimizer_states(optimizer: Optimizer) -> dict[str, int]:
    """Return ``optimizer_bytes`` by the parameters' shapes: "alike: 4x3" of tensors that have their
    parameter's shape, "beside: 4x3" of others.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    sizes: dict[str, int] = {}
    for i, (parameter, state) in enumerate(optimizer.state.items()):
        saved: dict[str, Tensor] = {}
        outline(state, f"the state of parameter {i}", saved)
        for tensor in saved.values():
            relation = "alike" if tensor.shape == parameter.shape else "beside"
            key = f"{relation}: {shape_key(parameter.shape)}"
            sizes[key] = sizes.get(key, 0) + count_bytes([tensor])
    return sizes


def require_memory(
    needed: Mapping[str, int], device: torch.device, name: str, largest: int
) -> None:
    """Raise ResourceError, before anything is allocated, if a run does not fit. ``needed`` is what
    ``of_process`` gives, ``largest`` the micro-batch size that fits.
    """
    if needed["total"] <= needed["available"]:
        return
    parts = [(size, part) for part, size in needed.items() if part not in ("total", "available")]
    most = sorted(parts, reverse=True)[:SHOWN_PARTS]
    raise ResourceError(
        f"{name} needs {format_bytes(needed['total'])} of memory on {device},"
        f" {format_bytes(needed['available'])} are free\n"
        f"  why: {', '.join(f'{part} {format_bytes(size)}' for size, part in most)}\n"
        f"  fix: {advice(largest)}"
    )


def advice(largest: int) -> str:
    """Return what to do about a run that does not fit."""
    if largest:
        return (
            f"set train.micro_batch_size={largest}: micro-batches of that size fit, and the"
            " gradient stays the same"
        )
    return (
        "not even micro-batches of one sequence fit: train.activation_checkpointing, a smaller"
        " train.batch_size or train.seq_len lower activations and memories, which an accelerator"
        " can also leave on the host (train.memory_device); weights, gradients and optimizer state"
        " need train.shard and more processes, a smaller model or a larger machine"
    )


def require_host_memory(needed: int, available: int, name: str) -> None:
    """Raise ResourceError if what accelerators leave in their machine's memory does not fit."""
    if needed <= available:
        return
    raise ResourceError(
        f"{name} needs {format_bytes(needed)} of the machine's memory beside its accelerators,"
        f" {format_bytes(available)} are free\n"
        "  why: memories of train.memory_device = 'host' exist twice, and checkpoint.asynchronous"
        " writes from a copy\n"
        "  fix: a smaller train.batch_size, checkpoint.asynchronous = false, or more machines"
    )
