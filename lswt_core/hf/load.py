"""Load a model in the HuggingFace format for generation."""

from __future__ import annotations

from pathlib import Path

import torch
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

    Code in the directory is not run. Raises CheckpointError if it holds another kind of model, no
    tokenizer, or one with more ids than the model has.
    """
    require_our_config(path)
    if not any(path.joinpath(name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{path} holds a model without a tokenizer\n"
            "  fix: save one into it,"
            f" AutoTokenizer.from_pretrained(NAME).save_pretrained({str(path)!r}), or import the"
            " model again with --tokenizer NAME"
        )
    with use_registry(registry):
        model = AutoModelForCausalLM.from_pretrained(path).eval().to(pick_device(0))
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
    except ValueError as error:
        raise CheckpointError(
            f"{path}: config.json describes no model that can be loaded here:"
            f" {str(error).splitlines()[0]}{import_hint(path)}"
        ) from error
    if not isinstance(config, LswtConfig):
        raise CheckpointError(
            f"{path} holds a model of type {config.model_type!r}, not one of this"
            f" library's{import_hint(path)}"
        )


def import_hint(path: Path) -> str:
    """Return how to convert a checkpoint of the original authors' code; "" for any other."""
    if MODEL_TYPE not in path.joinpath("config.json").read_text(encoding="utf-8"):
        return ""
    return (
        "\n  fix: it is a checkpoint of the original code; convert it first:"
        f" python -m lswt_core import {path} OUT"
    )
