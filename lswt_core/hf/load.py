"""A model from disk, whichever way it was written: by a run, or in the HuggingFace format."""

from __future__ import annotations

from pathlib import Path

import torch

from lswt_core.decode.load_run import LoadedModel, is_run, lack, load_run
from lswt_core.device import Precision, pick_device
from lswt_core.errors import CheckpointError
from lswt_core.registry import Registry


def open_model(path: Path, registry: Registry) -> LoadedModel:
    """The model in a directory; raises CheckpointError where there is none."""
    if is_run(path):
        return load_run(path, registry).model
    if path.joinpath("config.json").is_file():
        return open_exported(path, registry)
    raise CheckpointError(
        f"{path} holds no model: {lack(path)}\n  fix: name the directory of a run (what --out was,"
        " or runs/<recipe>), or one that export or import has written"
    )


def open_exported(path: Path, registry: Registry) -> LoadedModel:
    """A model in the HuggingFace format, computed in the precision it is stored in; no code beside
    it is run.
    """
    # slow to import, and not needed for a run
    from transformers import AutoConfig, AutoModelForCausalLM

    from lswt_core.hf.configuration import LswtConfig
    from lswt_core.hf.import_original import MODEL_TYPE, TOKENIZER_FILES

    try:
        config = AutoConfig.from_pretrained(path)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its config.json is of no model that can be opened here:"
            f" {str(error).splitlines()[0]}{hint(path, MODEL_TYPE)}"
        ) from error
    if not isinstance(config, LswtConfig):
        raise CheckpointError(
            f"{path} holds a model of type {config.model_type!r}, not one of this"
            f" library's{hint(path, MODEL_TYPE)}"
        )
    if not any(path.joinpath(name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{path} holds a model without a tokenizer\n  fix: save one into it,"
            f" AutoTokenizer.from_pretrained(NAME).save_pretrained({str(path)!r}), or import the"
            " model again with --tokenizer NAME"
        )
    model = AutoModelForCausalLM.from_pretrained(path).eval().to(pick_device(0))
    tokenizer = registry.get("tokenizer", "hf")(path=str(path))
    return LoadedModel(
        model.model.decoder, tokenizer, Precision(torch.float32, "as it is stored"), config.seq_len
    )


def hint(path: Path, original: str) -> str:
    """What to do with a checkpoint of the original authors' code."""
    if original not in path.joinpath("config.json").read_text(encoding="utf-8"):
        return ""
    return (
        "\n  fix: it is the original code's; turn it into ours first: python -m lswt_core import"
        f" {path} OUT"
    )
