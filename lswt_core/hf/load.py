"""Load a model in the HuggingFace format for generation."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from lswt_core.decode.load_run import LoadedModel
from lswt_core.device import Precision, pick_device
from lswt_core.errors import CheckpointError
from lswt_core.hf.components import use_registry
from lswt_core.hf.configuration import LswtConfig
from lswt_core.hf.import_original import TOKENIZER_FILES
from lswt_core.hf.original_config import MODEL_TYPE
from lswt_core.registry import Registry


def load_exported(path: Path, registry: Registry) -> LoadedModel:
    """Return the model and tokenizer of a directory, in the precision its weights are stored in;
    its components are the registry's.

    Code in the directory is not run. Raises CheckpointError if it holds another kind of model,
    damaged or missing files, no tokenizer, or one with more ids than the model has.
    """
    require_our_config(path)
    if not any(path.joinpath(name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{path} holds a model without a tokenizer\n"
            "  fix: save one into it,"
            f" AutoTokenizer.from_pretrained(NAME).save_pretrained({str(path)!r}), or import the"
            " model again with --tokenizer NAME"
        )
    try:
        with use_registry(registry):
            model = AutoModelForCausalLM.from_pretrained(path).eval().to(pick_device(0))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: its weights cannot be read: {first_line(error)}\n  fix: export it again, or"
            " copy the whole directory"
        ) from error
    tokenizer = registry.get("tokenizer", "hf")(path=str(path))
    rows = model.model.decoder.vocabulary.table.num_embeddings
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size:,} ids, and the model's vocabulary"
            f" {rows:,}: it is another model's tokenizer\n  fix: save the model's own into it"
        )
    precision = Precision(torch.float32, "as it is stored")
    return LoadedModel(model.model.decoder, tokenizer, precision, model.config.seq_len)


def require_our_config(path: Path) -> None:
    """Raise CheckpointError unless config.json is an LswtConfig."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: config.json describes no model that can be loaded here:"
            f" {first_line(error)}{cure_for(path)}"
        ) from error
    if not isinstance(config, LswtConfig):
        raise CheckpointError(
            f"{path} holds a model of type {config.model_type!r}, not one of this"
            f" library's{cure_for(path)}"
        )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0]


def cure_for(path: Path) -> str:
    """Return what to do about a directory that holds no model of this library."""
    config = path / "config.json"
    if not config.is_file() or MODEL_TYPE.encode() not in config.read_bytes():
        return "\n  fix: name a run, or a whole copy of what `python -m lswt_core export` wrote"
    return (
        "\n  fix: it is a checkpoint of the original code; convert it first:"
        f" python -m lswt_core import {path} OUT"
    )
