"""Export a run as a directory for the HuggingFace Hub: weights, config, code, tokenizer and model
card.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lswt_core.decode.load_run import StoredRun, open_run
from lswt_core.errors import CheckpointError, Incompatible
from lswt_core.hf.card import model_card
from lswt_core.hf.components import describe_components, model_tables, use_registry
from lswt_core.hf.configuration import LswtConfig
from lswt_core.hf.directory import written_whole
from lswt_core.hf.modeling import LswtForCausalLM
from lswt_core.hf.save import save_streamed
from lswt_core.hf.weight_files import (
    MAX_FILE_SIZE,
    ConvertedTensors,
    map_weights,
    require_same_bytes,
)
from lswt_core.interfaces import Tokenizer, Unsupported
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.registry.discover import FILE

PREFIX = "model.decoder."  # of the decoder's tensors, in the exported model
PROBE_TOKENS = 16  # per row, for comparing the exported model's logits with the run's


class Exported(NamedTuple):
    """Result of an export."""

    directory: Path
    notes: tuple[str, ...]
    needs_code: bool  # whether some components are of a single file, and of no package


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    address: str | None = None,
    registry: Registry | None = None,
    max_file_size: str | int = MAX_FILE_SIZE,
) -> Exported:
    """Write the newest checkpoint of a run to the new directory ``out``; the files are compared
    with the checkpoint, and the model is loaded again and must give bitwise the same logits.

    Tensors are read, written and compared one by one, and models are loaded memory-mapped: what a
    machine needs is memory for one tensor, of any checkpoint.

    ``address`` is what the model card loads the model by: a name on the Hub, by default the
    directory's name. ``registry`` knows the run's components, by default all installed ones; the
    source of a single-file plugin is bundled with the model's code. ``max_file_size``: of a file of
    weights, in bytes or as "5GB". Raises CheckpointError if the run has no checkpoint, or if
    ``out`` is not empty.
    """
    registry = registry or Registry()
    with use_registry(registry):
        stored = open_run(Path(run), registry)
        return write_export(stored, Path(run), Path(out), address, max_file_size)


def write_export(
    run: StoredRun, directory: Path, out: Path, address: str | None, max_file_size: str | int
) -> Exported:
    """Write the run of a directory to the new directory ``out``."""
    model = outline_model(run)
    tensors = ConvertedTensors(model.state_dict(), run.tensors(), PREFIX)
    sources = model.config.components.values()
    needs_code = any(source["distribution"] == FILE for source in sources)
    notes = []
    with written_whole(out) as partial:
        code = save_streamed(model, tensors, partial, max_file_size)
        if not code:
            notes.append(
                "some components are not this library's own: the model needs their packages to load"
            )
        save_tokenizer(run.tokenizer, partial)
        picture = (directory / "curves.png").is_file()
        if picture:
            shutil.copyfile(directory / "curves.png", partial / "curves.png")
        partial.joinpath("recipe.toml").write_text(run.recipe.dump(), encoding="utf-8")
        card = model_card(
            directory,
            run.recipe,
            run.saved.step,
            address or out.name,
            code=code,
            needs_code=needs_code,
            picture=picture,
        )
        partial.joinpath("README.md").write_text(card, encoding="utf-8")
        require_same_bytes(partial, tensors)
        require_same_logits(model, partial)
    return Exported(out, tuple(notes), needs_code)


def outline_model(run: StoredRun) -> LswtForCausalLM:
    """Return the run's model as a transformers model in float32 on the meta device, without its
    weights.
    """
    tokenizer = run.tokenizer
    special_tokens = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }
    with torch.device("meta"):
        model = LswtForCausalLM(config_of(run.recipe, special_tokens))
    model.generation_config = GenerationConfig(**special_tokens, **sampling_options(run.recipe))
    return model.eval()


def sampling_options(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's sampling as options of transformers' ``generate``."""
    sample = recipe.sample
    if not sample.temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": sample.temperature, "top_p": sample.top_p}


def config_of(recipe: Recipe, special_tokens: dict[str, int]) -> LswtConfig:
    """Return a recipe's config, with the ids of special tokens."""
    config = LswtConfig(
        recipe=model_tables(recipe),
        components=describe_components(recipe),
        seq_len=recipe.train.seq_len,
        **special_tokens,
    )
    config.max_position_embeddings = config.seq_len + config.memory_length
    return config


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer's files; raises Incompatible if its format has no equivalent."""
    try:
        tokenizer.save(directory)
    except Unsupported as error:
        raise Incompatible(f"the run cannot be exported: {error}") from error


def require_same_logits(model: LswtForCausalLM, directory: Path) -> None:
    """Raise CheckpointError unless transformers loads from the files the config of the model, which
    is on the meta device, and a model that gives bitwise its logits. The model is given the
    files' tensors by their names, so that what is compared is which module transformers puts them
    into, and how it builds the modules; that they are the run's is for ``require_same_bytes``.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, PROBE_TOKENS), generator=generator)
    fill_unsaved_buffers(model)
    model.load_state_dict(map_weights(directory), assign=True)
    exported = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        same = exported(ids).logits.equal(model(ids).logits)
    if not same or exported.config.recipe != model.config.recipe:
        raise CheckpointError(
            "the exported model does not give the logits of the run; nothing was written. This is a"
            " bug: please report it"
        )


@torch.no_grad()
def fill_unsaved_buffers(model: LswtForCausalLM) -> None:
    """Give the modules on the meta device that have buffers which no file holds their initial
    values.
    """
    saved = model.state_dict().keys()
    for name, module in model.named_modules():
        own = [f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False)]
        if not saved >= {*own}:
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
