"""Convert checkpoints of the original authors' code (github.com/Avelina9X/memory-transformer-pt4)
to our format.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lswt_core.errors import DataError
from lswt_core.hf.components import describe_components, model_tables
from lswt_core.hf.configuration import LswtConfig
from lswt_core.hf.directory import written_whole
from lswt_core.hf.modeling import LswtForCausalLM
from lswt_core.hf.original_config import conversion_notes, read_config, recipe_tables
from lswt_core.hf.original_weights import load_weights, read_weights
from lswt_core.hf.save import save_model
from lswt_core.plugin_api.hub import hub_options, summarise_error
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

logger = logging.getLogger(__name__)
# downloaded from the Hub: never pickled weights, never code
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


class Imported(NamedTuple):
    """Result of an import."""

    directory: Path
    config: LswtConfig
    # unknown config keys, what was left out, where numbers will differ
    notes: tuple[str, ...]


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    memory_length: int = 2048,
    dtype: str = "float32",
    revision: str = "",
    tokenizer: str | None = None,
) -> Imported:
    """Convert the checkpoint ``source``, a directory or a name on the Hub, into the new directory
    ``out``.

    ``memory_length`` is the length of the model's memory in tokens, which original checkpoints do
    not record. ``dtype`` is what weights are stored in: the originals are float16, and float32
    avoids rounding the computation to it. ``tokenizer``, a name on the Hub or a directory, is saved
    beside a model that has none (the originals use that of ``parent_embeddings``). Raises
    CheckpointError if the source is no original checkpoint, or uses what is not offered here.
    """
    directory = Path(source)
    if not directory.is_dir():
        directory = download(str(source), revision)
    config = read_config(directory)
    notes = conversion_notes(config)
    model = build_model(config, memory_length)
    weights = read_weights(directory, notes)
    load_weights(model, weights, getattr(torch, dtype), directory)
    with written_whole(Path(out)) as partial:
        save_model(model, partial)
        if not copy_tokenizer(directory, partial, tokenizer):
            parent = config.get("parent_embeddings", "facebook/opt-125m")
            notes.append(
                f"{directory} has no tokenizer: the original uses that of {parent};"
                f" --tokenizer {parent} saves it beside the model"
            )
    for note in notes:
        logger.warning(note)
    return Imported(Path(out), model.config, tuple(notes))


def download(name: str, revision: str) -> Path:
    """Return the directory of a model's files, downloaded from the Hub or in its cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED, **hub_options(revision)))
    except Exception as error:  # huggingface_hub and its HTTP client share no base class
        raise DataError(
            f"{name!r} is neither a directory nor a model that can be downloaded from the Hub:"
            f" {summarise_error(error)}\n"
            "  fix: check the name; without a network, download it elsewhere and give the directory"
        ) from error


def copy_tokenizer(directory: Path, out: Path, other: str | None) -> bool:
    """Copy the tokenizer's files, or save the ``other`` tokenizer; return whether there is one."""
    if other is not None:
        Registry().get("tokenizer", "hf")(path=other).save(out)
        return True
    copied = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    for name in copied:
        shutil.copyfile(directory / name, out / name)
    return bool(copied)


def build_model(config: Mapping[str, Any], memory_length: int) -> LswtForCausalLM:
    """Build the model of an original config on the meta device."""
    tables = {**recipe_tables(config, memory_length), "train": {"steps": 1}}
    recipe = Recipe.from_dict(tables, registry=Registry())
    special_tokens = {
        key: config[key]
        for key in ("pad_token_id", "bos_token_id", "eos_token_id")
        if config.get(key) is not None
    }
    with torch.device("meta"):
        ours = LswtConfig(
            recipe=model_tables(recipe),
            components=describe_components(recipe),
            seq_len=memory_length,
            **special_tokens,
        )
        return LswtForCausalLM(ours)
