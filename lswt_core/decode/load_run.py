"""Load a run's model and tokenizer for inference, without optimizer and training state."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lswt_core.checkpoint import Saved, Store
from lswt_core.checkpoint.compatibility import changed_code, check_fingerprint
from lswt_core.checkpoint.train_state import load_model
from lswt_core.data import cache_key, check_vocabulary
from lswt_core.data.token_directory import tokenizer_cache
from lswt_core.device import Precision, available_memory, pick_device
from lswt_core.errors import CheckpointError, ResourceError
from lswt_core.interfaces import DataSource, Document, Tokenizer
from lswt_core.model.build import build_decoder_spec
from lswt_core.model.code_fingerprint import fingerprint_components
from lswt_core.model.components import build_component
from lswt_core.model.decoder import Decoder
from lswt_core.model.initialise import initialise
from lswt_core.recipe import Recipe
from lswt_core.recipe.layer_selectors import MODEL_KINDS
from lswt_core.registry import Registry
from lswt_core.reporting.units import format_bytes

CHECKPOINTS = "checkpoints"
DECODER = "decoder."  # of a training module, in the names of its tensors
logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model and what inference needs besides."""

    decoder: Decoder  # in eval mode, on this machine's accelerator if it has one
    tokenizer: Tokenizer
    precision: Precision  # of forward passes
    seq_len: int  # training sequence length


class LoadedRun(NamedTuple):
    """A run's model, its recipe and its number of updates."""

    model: LoadedModel  # parameters in float32
    recipe: Recipe
    step: int


class StoredRun(NamedTuple):
    """A run's newest checkpoint, its recipe and its tokenizer; no weights are in memory."""

    saved: Saved
    recipe: Recipe
    tokenizer: Tokenizer

    def tensors(self) -> Mapping[str, Tensor]:
        """The decoder's tensors, each read when it is asked for."""
        return DecoderTensors(self.saved)


def is_run_directory(path: Path) -> bool:
    """Return whether a directory has a run's checkpoints."""
    return path.joinpath(CHECKPOINTS).is_dir()


def explain_missing_run(path: Path) -> str:
    """Return why a path is no run directory."""
    if not path.exists():
        return f"there is no such directory (looked from {Path.cwd()})"
    if not path.is_dir():
        return "it is a file"
    if any(path.iterdir()):
        return f"it has no directory {CHECKPOINTS!r}"
    return "it is empty"


def load_run(path: Path, registry: Registry) -> LoadedRun:
    """Load the newest intact checkpoint of a run, by the recipe stored in it. Raises
    CheckpointError if there is none.
    """
    stored = open_run(path, registry)
    recipe = stored.recipe
    device = pick_device(0)
    precision = Precision.choose(recipe.train.precision, device)
    with torch.device("meta"):
        decoder = build_decoder_spec(recipe, registry, device=device, dtype=precision.dtype).build()
    load_weights(decoder, stored.saved, recipe, device)
    model = LoadedModel(decoder.eval(), stored.tokenizer, precision, recipe.train.seq_len)
    return LoadedRun(model, recipe, stored.saved.step)


def open_run(path: Path, registry: Registry) -> StoredRun:
    """Open the newest intact checkpoint of a run, by the recipe stored in it. Raises
    CheckpointError if there is none.
    """
    if not is_run_directory(path):
        raise CheckpointError(
            f"{path} holds no model: {explain_missing_run(path)}\n"
            "  fix: name a run directory (--out of the run, or runs/<recipe>)"
        )
    saved = newest_checkpoint(path)
    where = str(saved.path / "recipe.json")
    recipe = Recipe.from_dict(saved.document("recipe"), where=where, registry=registry)
    warn_of_changed_code(saved, recipe, registry)
    return StoredRun(saved, recipe, load_tokenizer(recipe, registry, saved))


def newest_checkpoint(path: Path) -> Saved:
    """Return the newest intact checkpoint of a run directory; raises CheckpointError if none is."""
    store = Store(path / CHECKPOINTS)
    saved = store.newest(logger.warning)
    if saved is not None:
        return saved
    why = "it has saved no checkpoint yet"
    if store.steps():
        why = "none of its checkpoints is intact (see above)"
    raise CheckpointError(
        f"run {path} holds no model: {why}\n  fix: restore a checkpoint, or run its recipe again"
    )


def warn_of_changed_code(saved: Saved, recipe: Recipe, registry: Registry) -> None:
    """Log a warning for every component of model and tokenizer whose code is not what the
    checkpoint was trained with.
    """
    if not saved.holds("components"):
        return
    used = [chosen for kind in MODEL_KINDS for chosen in recipe.every(kind)]
    used = [inner for one in (*used, recipe.one("tokenizer")) for inner in one.with_inner()]
    current = fingerprint_components(used, registry, ())
    for line in changed_code(saved, current):
        logger.warning("the code of %s: the model may not be the one that was trained", line)


def load_tokenizer(recipe: Recipe, registry: Registry, saved: Saved) -> Tokenizer:
    """Return the run's tokenizer. The training text is read only if the tokenizer is trained on it
    and is no longer in the cache.
    """
    tokenizer: Tokenizer = build_component(registry, recipe.one("tokenizer"))
    expected: dict[str, str] = saved.document("fingerprint")

    def documents() -> Iterable[Document]:
        source: DataSource = build_component(registry, recipe.one("data"))
        check_fingerprint({"data": expected["data"]}, {"data": source.fingerprint()})
        return source.documents("train")

    key = cache_key(expected["data"], recipe.one("data"), recipe.one("tokenizer"))
    tokenizer.fit(documents, key, tokenizer_cache(recipe))
    check_fingerprint({"tokenizer": expected["tokenizer"]}, {"tokenizer": tokenizer.fingerprint()})
    check_vocabulary(tokenizer, recipe.embedding.vocab_size)
    return tokenizer


def load_weights(decoder: Decoder, saved: Saved, recipe: Recipe, device: torch.device) -> None:
    """Allocate a meta-device decoder on the device and load the checkpoint's weights; raises
    ResourceError if they do not fit.
    """
    needed, free = sum(t.nbytes for t in decoder.state_dict().values()), available_memory(device)
    if needed > free:
        raise ResourceError(
            f"the weights of {saved.path} take {format_bytes(needed)}, {format_bytes(free)} are"
            f" free on {device}"
        )
    decoder.to_empty(device=device)
    # buffers that are not saved in checkpoints
    if {name for name, _ in decoder.named_buffers()} - decoder.state_dict().keys():
        initialise(decoder, seed=recipe.train.seed, std=recipe.model.init_std)
    load_model(decoder, DecoderTensors(saved))


class DecoderTensors(Mapping[str, Tensor]):
    """The decoder's tensors of a checkpoint, which also holds those of the losses; each is read
    when it is asked for, so that no more than one is in memory besides the model's.
    """

    def __init__(self, saved: Saved) -> None:
        self.stored = saved.lazily("model")

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[DECODER + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(DECODER) for name in self.stored if name.startswith(DECODER))

    def __len__(self) -> int:
        return sum(1 for _ in self)
