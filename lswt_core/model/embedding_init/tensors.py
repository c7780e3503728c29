"""Find a model's embedding table among its tensors, and read that tensor alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lswt_core.errors import DataError

# of a model directory: one file of weights, or the index of several
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TABLE_NAMES = (  # the ends of known names of embedding tables
    "embed_tokens.weight",  # OPT, Llama and most others
    "wte.weight",  # GPT-2
    "embed_in.weight",  # GPT-NeoX, Pythia
    "word_embeddings.weight",  # BERT, BLOOM, Falcon
    "tok_embeddings.weight",  # Llama as published by Meta
    "vocabulary.table.weight",  # ours
    "input_embedding.embedding.weight",  # the original LSWTransformer
)

ShapeOf = Callable[[str], tuple[int, ...]]


class NamedTable(NamedTuple):
    """An embedding table and its tensor's name."""

    name: str
    table: Tensor  # [rows, width], in the precision it is stored in


def explain_pickle(source: str) -> str:
    """The part of an error message for models whose weights are a pickle only."""
    return (
        "a pickle (pytorch_model.bin) can run any code and is never loaded here\n  fix: convert it"
        ' once: python -c "from transformers import AutoModel;'
        f" AutoModel.from_pretrained('{source}').save_pretrained('DIR')\", and set"
        " embedding.warm_start = 'DIR'"
    )


def read_table_file(path: Path) -> NamedTable:
    """Read the table of a .safetensors or .npz file: its only 2-D tensor, or the one with a table's
    name. Raises DataError.
    """
    if not path.is_file():
        raise DataError(f"embedding.warm_start = '{path}': there is no such file")
    return read_npz(path) if path.suffix == ".npz" else read_safetensors(path)


def read_npz(path: Path) -> NamedTable:
    """Read the table of a .npz file."""
    with numpy.load(path, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    name = find_only_table(path, tensors, lambda name: tuple(tensors[name].shape))
    return NamedTable(name, tensors[name])


def read_safetensors(path: Path) -> NamedTable:
    """Read the table of one safetensors file."""
    name = find_only_table(path, read_tensor_names(path), lambda name: read_shape(path, name))
    return NamedTable(name, read_tensor(path, name))


def read_model_table(
    where: str, directory: Path, fetch: Callable[[str], Path], rows: int | None
) -> NamedTable:
    """Read the table of a model directory; ``fetch`` returns the path of a file, downloading it if
    need be; ``rows`` is the config's vocab_size, if it has one. Raises DataError if the table is
    ambiguous, naming the candidates, or a file is missing.
    """
    try:
        files = files_of_tensors(directory, fetch)
        name = find_table(where, files, lambda name: read_shape(fetch(files[name]), name), rows)
        return NamedTable(name, read_tensor(fetch(files[name]), name))
    except FileNotFoundError as error:
        raise DataError(
            f"embedding.warm_start = {where!r} is incomplete, a file of its weights is missing:"
            f" {error}"
        ) from error


def files_of_tensors(directory: Path, fetch: Callable[[str], Path]) -> dict[str, str]:
    """The file of every tensor of a model."""
    if (directory / WEIGHTS_INDEX).is_file():
        return json.loads((directory / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"]
    return dict.fromkeys(read_tensor_names(fetch(WEIGHTS)), WEIGHTS)


def find_only_table(path: Path, names: Iterable[str], shape: ShapeOf) -> str:
    """The name of a file's only 2-D tensor, else of the one with a table's name."""
    tables = sorted(name for name in names if len(shape(name)) == 2)
    if len(tables) == 1:
        return tables[0]
    return find_table(str(path), tables, shape, None)


def find_table(where: str, names: Iterable[str], shape: ShapeOf, rows: int | None) -> str:
    """The only tensor with one of TABLE_NAMES; without such, the only one with a table's shape,
    [rows, any], and "emb" or "wte" in its name. Raises DataError.
    """
    known = [name for name in names if f".{name}".endswith(tuple(f".{end}" for end in TABLE_NAMES))]
    likely = known or [
        name for name in names if is_named_like_table(name) and has_table_shape(shape(name), rows)
    ]
    if len(likely) != 1:
        choice = f"it has {sorted(names)[:20] or 'none at all'}"
        if likely:
            choice = f"these could each be it: {sorted(likely)}"
        raise DataError(
            f"embedding.warm_start = {where!r}: the embedding table cannot be told from the"
            f" other tensors, {choice}\n  fix: write the tensor that is meant into a"
            " .safetensors or .npz file of its own, and name that"
        )
    return likely[0]


def is_named_like_table(name: str) -> bool:
    """Whether a tensor's name suggests embeddings."""
    return "emb" in name.lower() or "wte" in name.lower()


def has_table_shape(shape: tuple[int, ...], rows: int | None) -> bool:
    """Whether a shape is [rows, any]; ``rows`` None: [any, any]."""
    return len(shape) == 2 and rows in (None, shape[0])


def read_tensor_names(path: Path) -> list[str]:
    """The names of a safetensors file's tensors, from its header. Raises DataError."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise DataError(
            f"embedding.warm_start: {path} is not a safetensors file, or is damaged: {error}"
        ) from error


def read_shape(path: Path, name: str) -> tuple[int, ...]:
    """A tensor's shape, from the header."""
    with safe_open(path, framework="pt") as file:
        return tuple(file.get_slice(name).get_shape())


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
