"""Peak memory of one process, measured on the meta device: nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lswt_core.checkpoint.values import outline
from lswt_core.device import available_memory
from lswt_core.distributed.world import World
from lswt_core.errors import ResourceError
from lswt_core.interfaces import Batch, CrossEntropy, Layer, Optimizer, WeightAverage
from lswt_core.model.decoder import Decoder
from lswt_core.model.parameters import trainable_parameters
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.pytree import detach_state, tree_leaves
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention
from lswt_core.plugin_api.token_scores import TILE
from lswt_core.recipe import Recipe
from lswt_core.reporting.units import format_bytes

FLOAT32_BYTES = 4
SHOWN_PARTS = 4  # of a run that does not fit
State = tuple[Mapping[str, Any], ...]


class MemoryBudget(NamedTuple):
    """Memory of a recipe for any batch size and number of processes."""

    # part -> bytes; "memories" and "activations" are per sequence; what is unknown is absent
    parts: dict[str, int]
    recipe: Recipe
    logits: Callable[[int], int]  # tokens -> bytes that their cross-entropy holds at once
    stream_width: int  # numbers of a token in the residual stream

    def of_process(self, world: World, micro: int | None = None) -> dict[str, int]:
        """Return the bytes of one process by part, their "total", and what is "available" on its
        device, for micro-batches of ``micro`` sequences (default: the recipe's). The total is of
        what is known.
        """
        train = self.recipe.train
        rows = len(world.rows(train.batch_size))
        micro = micro or world.micro_batch_size(train.batch_size, train.micro_batch_size)
        parts = self.parts | {"logits": self.logits(micro * train.seq_len)}
        if "activations" in self.parts:
            parts["memories"] = self.parts["memories"] * rows * 2  # this step's and the next's
            parts["activations"] = self.activations() * micro
        return parts | {"total": sum(parts.values()), "available": available_memory(world.device)}

    def activations(self) -> int:
        """Return the bytes per sequence that autograd saves; with activation checkpointing, the
        input of every block and what one recomputed block saves.
        """
        n_layers, train = self.recipe.model.n_layers, self.recipe.train
        if train.activation_checkpointing == "none":
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
        for micro in range(rows, 0, -1):
            if rows % micro == 0 and self.of_process(world, micro)["total"] <= available:
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


def batch_bytes(loss: TrainModule, batch: Batch, state: State, half: int) -> dict[str, int]:
    """Return the bytes that grow with the batch: the state of full memories, and the activations
    saved for the backward pass.
    """
    return {
        "memories": state_bytes(loss.decoder, state, half),
        "activations": saved_bytes(loss, batch, state) * half // FLOAT32_BYTES,
    }


def state_bytes(decoder: Decoder, state: State, half: int) -> int:
    """Return the bytes of a state measured in float32: what memories keep is in the compute
    precision, of ``half`` bytes per number; a recurrent state stays in float32, which sums up.
    """
    total = 0
    for block, layer_state in zip(decoder.blocks, state, strict=True):
        layers = [module for module in block.modules() if isinstance(module, Layer)]
        is_recurrent = any(layer.reach is None for layer in layers)
        memories = {
            name for one in layers if isinstance(one, SoftmaxAttention) for name in one.memory
        }
        for name, tree in layer_state.items():
            size = FLOAT32_BYTES if is_recurrent and name not in memories else half
            total += count_bytes(tree_leaves(tree)) * size // FLOAT32_BYTES
    return total


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
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    saved: dict[str, Tensor] = {}
    for i, state in enumerate(optimizer.state.values()):
        outline(state, f"the state of parameter {i}", saved)
    return count_bytes(list(saved.values()))


def meta_batch(rows: int, length: int) -> Batch:
    """Return a batch on the meta device."""
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    return Batch(ids, ids)


def warm_state(loss: TrainModule, batch: Batch) -> State:
    """Return the state of the memories once they are full."""
    state: Any = None
    for _ in range(1 + loss.decoder.memory_length // batch.inputs.shape[1]):
        with torch.no_grad():
            state = detach_state(loss.decoder(batch.inputs, state, batch.first_visible)[1])
    return state


def saved_bytes(loss: TrainModule, batch: Batch, state: State) -> int:
    """Return the float32 bytes that autograd saves in a forward pass."""
    excluded = {storage_key(t) for t in (*loss.parameters(), *tree_leaves(state))}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in excluded:
            saved[storage_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        # `result` keeps the graph alive, so that no storage key is used twice
        result = loss(batch, state)
    del result
    return sum(saved.values())


def storage_key(tensor: Tensor) -> int:
    """Return an identifier of a tensor's storage; meta tensors have no data pointer."""
    return tensor.untyped_storage()._cdata


def count_bytes(counted: Sequence[Tensor]) -> int:
    """Return the bytes of tensors, views by their own size."""
    return sum(tensor.numel() * tensor.element_size() for tensor in counted)


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
        "not even micro-batches of one sequence fit: a smaller train.batch_size or train.seq_len"
        " lowers memories and activations; weights, gradients and optimizer state need a smaller"
        " model, more processes or a larger machine"
    )
