"""What a rank holds of a checkpoint's tensors, and how the pieces of several ranks lie in files:
planned by torch.distributed.checkpoint (which rank writes or reads which), stored as safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lswt_core.plugin_api.sharded_tensor import is_sharded, local_tensor, piece_offset


@dataclass(frozen=True)
class Piece:
    """A piece of a tensor, and where it begins in the whole. Implements the protocol of
    torch.distributed.checkpoint.
    """

    tensor: Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the tensor."""
        return tuple(self.tensor.shape) == self.shape

    @property
    def whole_bytes(self) -> int:
        """The bytes of all of the tensor."""
        return self.size().numel() * self.tensor.element_size()

    def size(self) -> torch.Size:
        """The shape of the whole."""
        return torch.Size(self.shape)

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        if self.tensor.numel() == 0 and 0 not in self.shape:
            return []  # more ranks than rows
        return [ChunkStorageMetadata(torch.Size(self.offsets), self.tensor.shape)]

    def __create_write_items__(self, name: str, piece: object) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import (
            TensorWriteData,
            WriteItem,
            WriteItemType,
        )

        properties = TensorProperties.create_from_tensor(self.tensor)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]


def piece_of(tensor: Tensor | Piece) -> Piece:
    """What this rank holds of a tensor: its piece of a DTensor, the whole of any other."""
    if isinstance(tensor, Piece):
        return tensor
    if not is_sharded(tensor):
        return Piece(tensor, (0,) * tensor.ndim, tuple(tensor.shape))
    return Piece(local_tensor(tensor), piece_offset(tensor), tuple(tensor.shape))


def piece_like(tensor: Tensor, dtype: torch.dtype) -> Piece:
    """Memory on the CPU for what this rank holds of a tensor of that shape and cut."""
    piece = piece_of(tensor)
    return replace(piece, tensor=torch.empty(piece.tensor.shape, dtype=dtype))


def row_piece(tensor: Tensor, rows: range, total: int) -> Piece:
    """A tensor [rows, ...] of this rank's rows as a piece of the global batch's."""
    offsets = (rows.start, *(0,) * (tensor.ndim - 1))
    return Piece(tensor, offsets, (total, *tensor.shape[1:]))
