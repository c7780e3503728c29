"""What grows with the batch, measured on the meta device: the states of memories, and what autograd
saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lswt_core.budget.rank_model import FLOAT32_BYTES
from lswt_core.interfaces import Batch, Layer
from lswt_core.model.decoder import Decoder
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.pytree import detach_state, tree_leaves
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention

State = tuple[Mapping[str, Any], ...]


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
