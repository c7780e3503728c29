"""Which pieces of a checkpoint's tensors a rank reads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from lswt_core.checkpoint import Saved
from lswt_core.checkpoint.pieces import Piece, piece_like, row_piece
from lswt_core.checkpoint.train_state import model_tensors, named_parameters
from lswt_core.plugin_api.sharded_tensor import is_sharded, sharded_from_piece
from lswt_core.train.trainer import Trainer


def read_group(saved: Saved, group: str, trainer: Trainer) -> dict[str, Tensor]:
    """A group of tensors of a checkpoint, on the CPU: whole on a single process. One of several
    ranks gets its pieces of the parameters ("model", "trained"), its rows of "memory", and
    "optimizer" state that is cut as the parameters are. All ranks call this.
    """
    world = trainer.context.world
    if world.size == 1:
        return saved.tensors(group)
    from lswt_core.checkpoint.sharded import load_together

    if group == "optimizer":
        parameters = named_parameters(trainer.optimizer)
        pieces = load_together(saved, group, partial(wanted_moment, parameters), world)
        return {name: as_parameter(parameters, name, piece) for name, piece in pieces.items()}
    wanted = partial(wanted_rows, trainer)
    if group != "memory":
        wanted = partial(wanted_parameter, model_tensors(trainer.context.loss))
    pieces = load_together(saved, group, wanted, world)
    return {name: piece.tensor for name, piece in pieces.items()}


def wanted_rows(trainer: Trainer, name: str, shape: torch.Size, dtype: torch.dtype) -> Piece:
    """The rows of a memory's tensor that this rank has."""
    rows = trainer.context.rows
    return row_piece(torch.empty(len(rows), *shape[1:], dtype=dtype), rows, shape[0])


def wanted_parameter(
    tensors: Mapping[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype
) -> Piece:
    """A tensor cut as that of the model is; whole if the model has none of that name."""
    return piece_like(tensors.get(name, torch.empty(shape, device="meta")), dtype)


def wanted_moment(
    parameters: Mapping[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype
) -> Piece | None:
    """Optimizer state, cut as its parameter is if it has its shape; None if the parameter is
    another rank's.
    """
    if name.startswith("group "):
        return piece_like(torch.empty(shape, device="meta"), dtype)
    parameter = parameters.get(name.partition("/")[0])
    if parameter is None:
        return None
    if parameter.shape == shape:
        return piece_like(parameter, dtype)
    return piece_like(torch.empty(shape, device="meta"), dtype)


def as_parameter(parameters: Mapping[str, Tensor], name: str, piece: Piece) -> Tensor:
    """Optimizer state as a DTensor if its parameter is one of the same shape."""
    parameter = parameters.get(name.partition("/")[0])
    if parameter is None or not is_sharded(parameter) or piece.size() != parameter.shape:
        return piece.tensor
    return sharded_from_piece(piece.tensor, parameter)
