"""Memory states in a checkpoint: stored exactly, or rebuilt from the last tokens ("replay")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lswt_core.device import send
from lswt_core.interfaces import Batch
from lswt_core.plugin_api.pytree import (
    flatten,
    split_rows,
    tree_leaves,
    tree_map,
    unflatten,
)
from lswt_core.train.trainer import Trainer

MemoryMode = Literal["exact", "replay"]


def capture_memory(trainer: Trainer, mode: MemoryMode) -> tuple[dict[str, Tensor], Any]:
    """The memory states of this rank, or the tokens to rebuild them from, as named tensors and the
    JSON outline of their tree.

    "replay" also rebuilds the live states, so that a run that goes on and one that is resumed
    continue from the same numbers.
    """
    trainer.context.placement.flush()
    if mode == "exact":
        return flatten(join_on_host(trainer.memory), "memory")
    batches = []
    for batch in trainer.history:
        fields = batch._asdict().items()
        batches.append({name: tensor for name, tensor in fields if tensor is not None})
    captured = flatten(tuple(batches), "history")
    replay_memory(trainer)
    return captured


def join_on_host(states: Sequence[Any]) -> Any:
    """The states of all micro-batches as one, in the host's memory: a device that is full of them
    has no room for a copy.
    """
    columns = iter(list(zip(*map(tree_leaves, states), strict=True)))
    return tree_map(lambda _: join_rows_on_host(next(columns)), states[0])


def join_rows_on_host(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along their rows, into a tensor of the host's."""
    sizes = [len(part) for part in parts]
    joined = torch.empty((sum(sizes), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for target, part in zip(joined.split(sizes), parts, strict=True):
        target.copy_(part)
    return joined


def restore_memory(
    trainer: Trainer, mode: MemoryMode, tensors: dict[str, Tensor], outline: Any
) -> None:
    """Restore captured memory states; ``tensors`` are this rank's rows of them."""
    context = trainer.context
    tree = unflatten(outline, tensors)
    if mode == "replay":
        trainer.history.extend(Batch(**fields) for fields in tree)
        replay_memory(trainer)
        return
    states = split_rows(tree, len(context.rows), context.micro_batch_size)
    trainer.memory = [context.placement.restore(state) for state in states]


@torch.no_grad()
def replay_memory(trainer: Trainer) -> None:
    """Rebuild memory states from cold by reading the batches of the trainer's history."""
    context = trainer.context
    trainer.memory = [None] * len(trainer.memory)
    with context.precision.autocast(context.world.device):
        for batch in trainer.history:
            for i in range(len(trainer.memory)):
                state = context.placement.fetch(trainer.memory, i)
                micro = select_micro_batch(batch, i, context.micro_batch_size, context.world.device)
                _, state = context.loss.hidden_states(micro.inputs, state, micro.first_visible)
                trainer.memory[i] = context.placement.keep(state)


def select_micro_batch(batch: Batch, i: int, size: int, device: torch.device) -> Batch:
    """The rows of micro-batch ``i``, on a device."""
    rows = slice(i * size, (i + 1) * size)
    return batch.map(lambda tensor: send(tensor[rows], device))
