"""Word embeddings taken from a pretrained model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from lswt_core.errors import DataError

WAYS_OUT = "or set embedding.warm_start = 'none' (random table), a local directory, or a .safetensors or .npz file"


def pretrained_table(source: str, *, vocab_size: int, d_vocab: int) -> Tensor:
    """The input embeddings [V, d_vocab] of a Hub model, a local model directory, or a file that holds one 2-D tensor."""
    path = Path(source)
    table = from_file(path) if path.suffix in (".safetensors", ".npz") else from_model(source)
    if tuple(table.shape) != (vocab_size, d_vocab):
        raise DataError(
            f"embedding.warm_start = {source!r} is a table of {table.shape[0]:,} x {table.shape[1]}, but the recipe asks for "
            f"embedding.vocab_size = {vocab_size:,} and embedding.d_vocab = {d_vocab}: make them equal, {WAYS_OUT}"
        )
    return table.to(torch.float32)


def from_file(path: Path) -> Tensor:
    """The only 2-D tensor of a file."""
    if not path.is_file():
        raise DataError(f"embedding.warm_start = '{path}': there is no such file")
    if path.suffix == ".npz":
        with numpy.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in arrays}
    else:
        found = load_file(path)
    tables = {name: tensor for name, tensor in found.items() if tensor.ndim == 2}
    if len(tables) != 1:
        raise DataError(f"embedding.warm_start = '{path}' must hold exactly one 2-D tensor, it holds {sorted(tables) or 'none'}")
    return next(iter(tables.values()))


def from_model(source: str) -> Tensor:
    """The input embeddings of a transformers model, by Hub name or local directory."""
    from transformers import AutoModel  # slow to import, and only needed here

    try:
        model = AutoModel.from_pretrained(source, cache_dir=os.environ.get("HF_CACHE_DIR"), token=os.environ.get("HF_API_KEY"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"embedding.warm_start = {source!r} cannot be loaded: {reason}\n  fix: connect to the Hub, {WAYS_OUT}") from error
    return model.get_input_embeddings().weight.detach().clone()
