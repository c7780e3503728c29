"""Bytes a process needs on its device, measured on the meta device: nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lswt_core.checkpoint.values import outline
from lswt_core.device import available_memory
from lswt_core.distributed.world import World
from lswt_core.errors import ResourceError
from lswt_core.interfaces import Batch, CrossEntropy, Optimizer
from lswt_core.model.parameters import trainable
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.cross_entropy import TILE
from lswt_core.plugin_api.pytree import kept, tensors
from lswt_core.recipe import Recipe
from lswt_core.reporting.units import format_bytes

WORD = 4  # bytes of a float32 number
State = tuple[Mapping[str, Any], ...]


class Memory(NamedTuple):
    """A recipe's needs, for any number of rows and processes."""

    # bytes by what needs them; "memories" and "activations" are of one row; what is unknown is
    # absent
    found: dict[str, int]
    recipe: Recipe
    logits: Callable[[int], int]  # bytes that the cross-entropy of so many tokens holds at once

    def of_process(self, world: World, micro: int | None = None) -> dict[str, int]:
        """Bytes of one process by what needs them, their total, and what is available on its
        device. ``micro`` rows are run at a time, by default as many as the recipe says. The total
        is of what is known.
        """
        rows = len(world.rows(self.recipe.train.batch_size))
        micro = micro or min(self.recipe.train.micro_batch_size or rows, rows)
        parts = self.found | {"logits": self.logits(micro * self.recipe.train.seq_len)}
        if "activations" in self.found:
            parts["memories"] = self.found["memories"] * rows * 2  # this step's and the next's
            parts["activations"] = self.activations() * micro
        return parts | {"total": sum(parts.values()), "available": available_memory(world.device)}

    def activations(self) -> int:
        """Bytes of a row that autograd keeps; where blocks are run again, every block's input and
        what one of them keeps.
        """
        model, train = self.recipe.model, self.recipe.train
        if train.activation_checkpointing == "none":
            return self.found["activations"]
        inputs = model.n_layers * train.seq_len * model.d_model * WORD
        return inputs + self.found["activations"] // model.n_layers

    def largest_micro(self, world: World, available: int | None = None) -> int:
        """The most rows that fit at a time, a divisor of the process's rows; 0 if not one does."""
        rows = len(world.rows(self.recipe.train.batch_size))
        available = available_memory(world.device) if available is None else available
        fitting = (
            n
            for n in range(rows, 0, -1)
            if rows % n == 0 and self.of_process(world, n)["total"] <= available
        )
        return next(fitting, 0)


def parameter_bytes(loss: TrainModule, optimizer: Optimizer, half: int) -> dict[str, int]:
    """Bytes of what belongs to parameters: weights and gradients in float32, only a frozen table in
    float16, and the copies that are computed with. ``half`` is the size of a number computed with.
    """
    weights = list(loss.parameters())
    return {
        "weights": bytes_of(weights),
        "gradients": bytes_of(trainable(loss)) * (2 if optimizer.shares_forward else 1),
        # of one micro-batch
        "cast_weights": half * sum(w.numel() for w in weights if w.dtype.itemsize != half),
    }


def batch_bytes(loss: TrainModule, batch: Batch, state: State, half: int) -> dict[str, int]:
    """Bytes that grow with a batch: what a warm model remembers, and what autograd keeps for the
    backward pass.
    """
    return {
        "memories": bytes_of(tensors(state)) * half // WORD,
        "activations": saved_bytes(loss, batch, state) * half // WORD,
    }


def logits_bytes(scoring: CrossEntropy, device: str, table: Tensor, half: int, tokens: int) -> int:
    """Bytes of the logits that exist at once, and of two float32 copies of those that are worked
    on.
    """
    logits = scoring.peak_logits(device, tokens, table)
    return half * logits + 2 * WORD * min(logits, TILE)


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state, by taking one step without numbers: what that leaves in it.

    Raises CheckpointError if no checkpoint can hold it.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    kept: dict[str, Tensor] = {}
    for i, state in enumerate(optimizer.state.values()):
        outline(state, f"the state of parameter {i}", kept)
    return bytes_of(list(kept.values()))


def blank(rows: int, length: int) -> Batch:
    """A batch without numbers."""
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    return Batch(ids, ids)


def warm_state(loss: TrainModule, batch: Batch) -> State:
    """What a model remembers once its memories are full."""
    state: Any = None
    for _ in range(1 + loss.decoder.reach // batch.inputs.shape[1]):
        with torch.no_grad():
            state = kept(loss.decoder(batch.inputs, state, batch.first_visible)[1])
    return state


def saved_bytes(loss: TrainModule, batch: Batch, state: State) -> int:
    """float32 bytes of what autograd saves in a step."""
    known = {storage(t) for t in (*loss.parameters(), *tensors(state))}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if storage(tensor) not in known:
            saved[storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # `result` keeps the graph, and so the storages' addresses, alive while they are counted
        result = loss(batch, state)
    del result
    return sum(saved.values())


def storage(tensor: Tensor) -> int:
    """What tells one tensor's memory from another's, also where there are no addresses."""
    return tensor.untyped_storage()._cdata


def bytes_of(found: Sequence[Tensor]) -> int:
    """Bytes of tensors, views counted by their own size."""
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def require_memory(found: Mapping[str, int], device: torch.device, name: str, largest: int) -> None:
    """Raise ResourceError, before anything is allocated, if the run does not fit; ``largest`` is
    the micro-batch that would.
    """
    if found["total"] <= found["available"]:
        return
    most = sorted(
        ((size, part) for part, size in found.items() if part not in ("total", "available")),
        reverse=True,
    )[:4]
    raise ResourceError(
        f"{name} needs {format_bytes(found['total'])} of memory on {device},"
        f" {format_bytes(found['available'])} are free\n  why:"
        f" {', '.join(f'{part} {format_bytes(size)}' for size, part in most)}\n  fix:"
        f" {advice(largest)}"
    )


def advice(largest: int) -> str:
    """What to do about a run that does not fit."""
    if largest:
        return (
            f"set train.micro_batch_size={largest}: micro-batches of that many rows fit, and the"
            " result stays the same"
        )
    return (
        "not even micro-batches of one row fit: fewer train.batch_size or a shorter train.seq_len"
        " lowers memories and activations; weights, gradients and optimizer state need a smaller"
        " model, more processes or a larger machine"
    )
