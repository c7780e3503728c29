"""A trained model from disk, ready to read and write: the decoder and its tokenizer, nothing that
only training needs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lswt_core.checkpoint import Saved, Store
from lswt_core.checkpoint.compatibility import check_fingerprint
from lswt_core.checkpoint.train_state import load_model
from lswt_core.data import cache_directory, cache_key, check_vocabulary
from lswt_core.device import Precision, available_memory, pick_device
from lswt_core.errors import CheckpointError, ResourceError
from lswt_core.interfaces import DataSource, Document, Tokenizer
from lswt_core.model.build import assemble_blueprint
from lswt_core.model.components import create
from lswt_core.model.decoder import Decoder
from lswt_core.model.initialise import initialise
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.console import gigabytes

CHECKPOINTS = "checkpoints"
logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model and what is needed to use it."""

    decoder: Decoder  # on this machine's accelerator if it has one
    tokenizer: Tokenizer
    precision: Precision  # what a forward pass computes in
    seq_len: int  # how many tokens the model was trained to read at once


class LoadedRun(NamedTuple):
    """The model of a run, and where it comes from."""

    model: LoadedModel  # its parameters float32
    recipe: Recipe
    step: int  # how many updates it was trained for


def is_run(path: Path) -> bool:
    """Whether a directory looks like a run's."""
    return path.joinpath(CHECKPOINTS).is_dir()


def lack(path: Path) -> str:
    """Why a path is no run directory."""
    if not path.exists():
        return f"there is no such directory (looked from {Path.cwd()})"
    if not path.is_dir():
        return "it is a file"
    return f"it has no directory {CHECKPOINTS!r}" if any(path.iterdir()) else "it is empty"


def load_run(path: Path, registry: Registry) -> LoadedRun:
    """The model of a run, as its newest intact checkpoint has it; the recipe is the checkpoint's
    own. Raises CheckpointError where there is none.
    """
    if not is_run(path):
        raise CheckpointError(
            f"{path} holds no model: {lack(path)}\n  fix: name the directory of a run (what --out"
            " was, or runs/<recipe>)"
        )
    saved = newest(path)
    recipe = Recipe.from_dict(
        saved.document("recipe"), where=str(saved.path / "recipe.json"), registry=registry
    )
    device = pick_device(0)
    precision = Precision.choose(recipe.train.precision, device)
    tokenizer = open_tokenizer(recipe, registry, saved)
    with torch.device("meta"):
        decoder = assemble_blueprint(recipe, registry, device=device, dtype=precision.dtype).build()
    fill(decoder, saved, recipe, device)
    return LoadedRun(
        LoadedModel(decoder.eval(), tokenizer, precision, recipe.train.seq_len), recipe, saved.step
    )


def newest(path: Path) -> Saved:
    """The newest intact checkpoint of a run."""
    store = Store(path / CHECKPOINTS)
    saved = store.newest(logger.warning)
    if saved is None:
        why = (
            "none of its checkpoints is intact (see above)"
            if store.steps()
            else "it has saved no checkpoint yet"
        )
        raise CheckpointError(
            f"run {path} holds no model: {why}\n  fix: restore one, or run its recipe again"
        )
    return saved


def open_tokenizer(recipe: Recipe, registry: Registry, saved: Saved) -> Tokenizer:
    """The tokenizer a run was trained with. Its text is read only if the tokenizer learns from it
    and is no longer in the cache.
    """
    tokenizer: Tokenizer = create(registry, recipe.one("tokenizer"))
    expected: dict[str, str] = saved.document("fingerprint")

    def documents() -> Iterable[Document]:
        source: DataSource = create(registry, recipe.one("data"))
        check_fingerprint({"data": expected["data"]}, {"data": source.fingerprint()})
        return source.documents("train")

    tokenizer.fit(
        documents,
        cache_key(expected["data"], recipe.one("data"), recipe.one("tokenizer")),
        cache_directory(),
    )
    check_fingerprint({"tokenizer": expected["tokenizer"]}, {"tokenizer": tokenizer.fingerprint()})
    check_vocabulary(tokenizer, recipe.embedding.vocab_size)
    return tokenizer


def fill(decoder: Decoder, saved: Saved, recipe: Recipe, device: torch.device) -> None:
    """Give a decoder memory on the device, and the checkpoint's numbers."""
    needed, free = sum(t.nbytes for t in decoder.state_dict().values()), available_memory(device)
    if needed > free:
        raise ResourceError(
            f"the weights of {saved.path} take {gigabytes(needed)}, {gigabytes(free)} are free on"
            f" {device}"
        )
    decoder.to_empty(device=device)
    # buffers that no checkpoint holds
    if {name for name, _ in decoder.named_buffers()} - decoder.state_dict().keys():
        initialise(decoder, seed=recipe.train.seed, std=recipe.model.init_std)
    load_model(decoder, decoder_tensors(saved))


def decoder_tensors(saved: Saved) -> dict[str, Tensor]:
    """The decoder's share of a checkpoint's model, which has losses besides."""
    return {
        name.removeprefix("decoder."): t
        for name, t in saved.tensors("model").items()
        if name.startswith("decoder.")
    }
