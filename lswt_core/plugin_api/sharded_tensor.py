"""For optimizers and losses on several ranks, where every parameter, its gradient and its optimizer
state are DTensors (torch.distributed.tensor) of which each rank holds a piece.

Element-wise operations need nothing of this: they act on the pieces. What needs a whole tensor, or
a number about one, goes through these functions. Each takes plain tensors too, which it treats as
whole. ``float`` of a DTensor's norm or sum is that of this rank's piece alone: a silent error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Does not import torch.distributed.tensor, which a single
    process has no use for.
    """
    return hasattr(tensor, "to_local")


@torch.no_grad()
def local_tensor(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this rank holds, sharing its storage; it may be empty."""
    if not is_sharded(tensor):
        return tensor
    piece: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return piece


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``local_tensor`` of each."""
    return [local_tensor(tensor) for tensor in tensors]


@torch.no_grad()
def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks, all of which must call this."""
    if not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


@torch.no_grad()
def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, cut as ``like`` of the same shape is; in its dtype
    and on its device. Without communication.
    """
    if not is_sharded(like):
        return whole.to(like)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    whole = whole.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, [], by one all-reduce. All are plain, or all are cut over
    the same mesh.
    """
    norms = torch._foreach_norm(local_tensors(tensors))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if not is_sharded(tensors[0]):
        return norm
    return sum_over_pieces(norm.square(), tensors[0]).sqrt()


def sum_over_pieces(numbers: Tensor, like: Any) -> Tensor:
    """Numbers about this rank's pieces, such as counts, summed over the ranks that hold the other
    pieces of tensors that are cut as ``like`` is.
    """
    if not is_sharded(like):
        return numbers
    import torch.distributed as dist

    for dim, placement in enumerate(like.placements):
        if placement.is_shard() and like.device_mesh.size(dim) > 1:
            dist.all_reduce(numbers, group=like.device_mesh.get_group(dim))
    return numbers


def piece_offset(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's piece begins in the whole tensor, by dimension."""
    if not is_sharded(tensor):
        return (0,) * tensor.ndim
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(offsets)


def sharded_from_piece(piece: Tensor, like: Tensor) -> Tensor:
    """A DTensor cut as ``like`` is, from this rank's piece of it, in the piece's dtype."""
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        piece.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
