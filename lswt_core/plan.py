"""What a recipe would take, measured on the meta device: parameters, memory, floating-point operations. Nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lswt_core.assemble import Assembled, assemble, build_optimizer, count_parameters
from lswt_core.console import gigabytes
from lswt_core.errors import ResourceError
from lswt_core.head import CHUNK
from lswt_core.interfaces import Batch
from lswt_core.loss import Loss
from lswt_core.parallel import Precision, World, available_memory
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.step import trainable
from lswt_core.tree import tensors, tree_map

WORD = 4  # bytes of a float32 number


def plan(recipe: Recipe, registry: Registry, world: World) -> dict[str, Any]:
    """Everything worth knowing before a run, as plain data."""
    precision = Precision.choose(recipe.train.precision, world.device)
    built = assemble(recipe, registry, device=world.device, dtype=precision.dtype)
    return {
        "recipe": recipe.name,
        "overlay": recipe.overlay,
        "parameters": count_parameters(built.loss),
        "memory": memory(recipe, registry, built, precision, world),
        "flops": {"forward_per_token": forward_flops(recipe, built.loss)},
        "run": {
            "steps": recipe.train.total_steps,
            "tokens_per_step": recipe.train.tokens_per_step,
            "tokens": recipe.train.total_steps * recipe.train.tokens_per_step,
        },
        "device": str(world.device),
        "precision": f"{precision.dtype}".removeprefix("torch."),
        "attention": {"backend": built.attention, "notes": list(built.notes)},
    }


def memory(recipe: Recipe, registry: Registry, built: Assembled, precision: Precision, world: World) -> dict[str, int]:
    """Bytes a process needs on its device, by what needs them.

    Weights, gradients and moments are float32, only a frozen table is float16. The optimizer's share is what one step on the meta
    device leaves in its state; memories are what a warm model returns; activations are what autograd keeps of one micro-batch.
    """
    weights = list(built.loss.parameters())
    rows = len(world.rows(recipe.train.rows))
    micro = min(recipe.train.micro_rows or rows, rows)
    half = precision.dtype.itemsize
    kept, activations = remembered_and_saved(recipe, built.loss, micro)
    parts = {
        "weights": bytes_of(weights),
        "gradients": bytes_of(trainable(built.loss)),
        "optimizer": optimizer_bytes(recipe, registry, built.loss),
        "cast_weights": half * sum(w.numel() for w in weights if w.dtype != precision.dtype),  # copies, of one micro-batch
        "memories": kept * rows // micro * half // WORD * 2,  # this step's and the next's
        "activations": activations * half // WORD,
        "loss_chunk": 2 * WORD * CHUNK * recipe.embedding.vocab_size,
    }
    return parts | {"total": sum(parts.values()), "available": available_memory(world.device)}


def optimizer_bytes(recipe: Recipe, registry: Registry, loss: Loss) -> int:
    """Bytes of the optimizer's state, by taking one step without numbers."""
    optimizer = build_optimizer(recipe, registry, loss)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def blank(rows: int, length: int) -> Batch:
    """A batch without numbers."""
    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    return Batch(ids, ids)


def remembered_and_saved(recipe: Recipe, loss: Loss, rows: int) -> tuple[int, int]:
    """float32 bytes of the memories of some rows once warm, and of what autograd saves in a warm step of them."""
    batch, state, size = blank(rows, recipe.train.context), None, -1
    while state is None or (now := bytes_of(tensors(state))) != size:  # until the memories stop growing
        size = -1 if state is None else now
        with torch.no_grad():
            state = tree_map(Tensor.detach, loss(batch, state).state)
    known = {storage(t) for t in (*loss.parameters(), *tensors(state))}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if storage(tensor) not in known:
            saved[storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = loss(batch, state)  # `result` keeps the graph, and so the storages' addresses, alive while they are counted
    del result
    return size, sum(saved.values())


def storage(tensor: Tensor) -> int:
    """What tells one tensor's memory from another's, also where there are no addresses."""
    return tensor.untyped_storage()._cdata


def bytes_of(found: Sequence[Tensor]) -> int:
    """Bytes of tensors, views counted by their own size."""
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def forward_flops(recipe: Recipe, loss: Loss) -> int:
    """Floating-point operations of a token's forward pass from cold, attention counted over the whole square."""
    with FlopCounterMode(display=False) as counter:  # its module tracker does not go together with no_grad
        loss.decoder.vocabulary.logits(loss.decoder(blank(1, recipe.train.context).inputs)[0])
    return counter.get_total_flops() // recipe.train.context


def require_memory(found: dict[str, int], device: torch.device, name: str) -> None:
    """Raise ResourceError, before anything is allocated, if the run does not fit."""
    if found["total"] <= found["available"]:
        return
    largest = sorted(((size, part) for part, size in found.items() if part not in ("total", "available")), reverse=True)[:4]
    raise ResourceError(
        f"{name} needs {gigabytes(found['total'])} of memory on {device}, {gigabytes(found['available'])} are free\n"
        f"  why: {', '.join(f'{part} {gigabytes(size)}' for size, part in largest)}\n"
        "  fix: a smaller train.micro_rows, train.rows or train.context lowers activations and memories; weights, gradients and "
        "optimizer state need a smaller model or a larger machine"
    )
