"""Which tensor of a model is its table of word embeddings; that one alone is read."""

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

# of a model directory: all in one file, or where each tensor is
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
KNOWN = (  # how the table's name ends
    "embed_tokens.weight",  # OPT, Llama and most others
    "wte.weight",  # GPT-2
    "embed_in.weight",  # GPT-NeoX, Pythia
    "word_embeddings.weight",  # BERT, BLOOM, Falcon
    "tok_embeddings.weight",  # Llama as published by Meta
    "vocabulary.table.weight",  # ours
    "input_embedding.embedding.weight",  # the original LSWTransformer
)

Shape = Callable[[str], tuple[int, ...]]


class Found(NamedTuple):
    """A table and what it is called."""

    name: str
    table: Tensor  # [rows, width], in the precision it is stored in


def convert_once(source: str) -> str:
    """What to say where a model has its weights in a pickle only."""
    return (
        "a pickle (pytorch_model.bin) can run any code and is never loaded here\n  fix: convert it"
        ' once: python -c "from transformers import AutoModel;'
        f" AutoModel.from_pretrained('{source}').save_pretrained('DIR')\", and set"
        " embedding.warm_start = 'DIR'"
    )


def from_file(path: Path) -> Found:
    """The table in a .safetensors or .npz file: its only 2-D tensor, or the one that is named like
    a table. Raises DataError.
    """
    if not path.is_file():
        raise DataError(f"embedding.warm_start = '{path}': there is no such file")
    return from_npz(path) if path.suffix == ".npz" else from_safetensors(path)


def from_npz(path: Path) -> Found:
    """The table among numpy's arrays."""
    with numpy.load(path, allow_pickle=False) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays}
    name = only_table(path, found, lambda name: tuple(found[name].shape))
    return Found(name, found[name])


def from_safetensors(path: Path) -> Found:
    """The table in one safetensors file."""
    name = only_table(path, tensor_names(path), lambda name: shape_in(path, name))
    return Found(name, read(path, name))


def from_model(
    where: str, directory: Path, fetch: Callable[[str], Path], rows: int | None
) -> Found:
    """The table of a model whose files ``fetch`` brings, one by one as they are needed; ``rows`` is
    its config's vocab_size, if it has one. Raises DataError where the table cannot be told from the
    other tensors, naming the candidates, or a file is missing.
    """
    try:
        files = places(directory, fetch)
        name = table_name(where, files, lambda name: shape_in(fetch(files[name]), name), rows)
        return Found(name, read(fetch(files[name]), name))
    except FileNotFoundError as error:
        raise DataError(
            f"embedding.warm_start = {where!r} is incomplete, a file of its weights is missing:"
            f" {error}"
        ) from error


def places(directory: Path, fetch: Callable[[str], Path]) -> dict[str, str]:
    """The file that each tensor of a model is in."""
    if (directory / INDEX).is_file():
        return json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return dict.fromkeys(tensor_names(fetch(WHOLE)), WHOLE)


def only_table(path: Path, names: Iterable[str], shape: Shape) -> str:
    """The name of a file's only 2-D tensor, else of the one that is named like a table."""
    tables = sorted(name for name in names if len(shape(name)) == 2)
    return tables[0] if len(tables) == 1 else table_name(str(path), tables, shape, None)


def table_name(where: str, names: Iterable[str], shape: Shape, rows: int | None) -> str:
    """The tensor whose name is a table's in one of the known models; else the only one that has a
    table's shape, [rows, any], and "emb" or "wte" in its name.
    """
    known = [name for name in names if f".{name}".endswith(tuple(f".{end}" for end in KNOWN))]
    likely = known or [
        name for name in names if named_like_a_table(name) and is_table(shape(name), rows)
    ]
    if len(likely) != 1:
        choice = (
            f"these could each be it: {sorted(likely)}"
            if likely
            else f"it has {sorted(names)[:20] or 'none positions all'}"
        )
        raise DataError(
            f"embedding.warm_start = {where!r}: the table of word embeddings cannot be told from"
            f" the other tensors, {choice}\n  fix: write the tensor that is meant into a"
            " .safetensors or .npz file of its own, and name that"
        )
    return likely[0]


def named_like_a_table(name: str) -> bool:
    """Whether a tensor's name hints at embeddings."""
    return "emb" in name.lower() or "wte" in name.lower()


def is_table(shape: tuple[int, ...], rows: int | None) -> bool:
    """Whether a tensor has the shape of a table of so many rows (None: of any number)."""
    return len(shape) == 2 and rows in (None, shape[0])


def tensor_names(path: Path) -> list[str]:
    """The tensors in a safetensors file; its header is all that is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise DataError(
            f"embedding.warm_start: {path} is not a safetensors file, or is damaged: {error}"
        ) from error


def shape_in(path: Path, name: str) -> tuple[int, ...]:
    """A tensor's shape, from the header."""
    with safe_open(path, framework="pt") as file:
        return tuple(file.get_slice(name).get_shape())


def read(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
