"""A run turned into a directory that can be pushed to the Hub: weights, config, code, tokenizer and
model card.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from lswt_core.decode.load_run import LoadedRun, load_run
from lswt_core.errors import CheckpointError, Incompatible
from lswt_core.hf.card import model_card
from lswt_core.hf.components import describe_components, known, tables_of
from lswt_core.hf.configuration import LswtConfig
from lswt_core.hf.directory import written_whole
from lswt_core.hf.modeling import LswtForCausalLM
from lswt_core.hf.save import save_model
from lswt_core.interfaces import Tokenizer, Unsupported
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

PROBE = 16  # tokens of each of two rows on which the written model is compared with the run's


class Exported(NamedTuple):
    """What an export has done."""

    directory: Path
    notes: tuple[str, ...]


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    address: str | None = None,
    registry: Registry | None = None,
) -> Exported:
    """Write the newest checkpoint of a run to the new directory ``out``; it is read back and must
    give the very same logits.

    ``address`` is what the model card says the model is loaded by: a name on the Hub, or the
    directory's. ``registry`` knows the run's components, by default those that are installed; the
    source of a single-file plugin goes into the model's own code. Raises CheckpointError if there
    is no checkpoint, or ``out`` holds something already.
    """
    registry = registry or Registry()
    with known(registry):
        return write_run(load_run(Path(run), registry), Path(run), Path(out), address)


def write_run(opened: LoadedRun, directory: Path, out: Path, address: str | None) -> Exported:
    """Write the opened run of a directory to the new directory ``out``."""
    model = model_of(opened)
    notes = []
    with written_whole(out) as partial:
        code = save_model(model, partial)
        if not code:
            notes.append(
                "some components are not this library's own: the model needs their packages to load"
            )
        save_tokenizer(opened.model.tokenizer, partial)
        picture = (directory / "curves.png").is_file()
        if picture:
            shutil.copyfile(directory / "curves.png", partial / "curves.png")
        partial.joinpath("recipe.toml").write_text(opened.recipe.dump(), encoding="utf-8")
        card = model_card(
            directory, opened.recipe, opened.step, address or out.name, code=code, picture=picture
        )
        partial.joinpath("README.md").write_text(card, encoding="utf-8")
        compare(model, partial)
    return Exported(out, tuple(notes))


def model_of(opened: LoadedRun) -> LswtForCausalLM:
    """The run's model in transformers' class, in float32."""
    tokenizer, sample = opened.model.tokenizer, opened.recipe.sample
    special = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }
    with torch.device("meta"):
        model = LswtForCausalLM(config_of(opened.recipe, special))
    weights = {
        f"model.decoder.{name}": tensor.float().cpu()
        for name, tensor in opened.model.decoder.state_dict().items()
    }
    model.load_state_dict(weights, assign=True)
    drawn = (
        {"do_sample": True, "temperature": sample.temperature, "top_p": sample.top_p}
        if sample.temperature
        else {"do_sample": False}
    )
    model.generation_config = GenerationConfig(**special, **drawn)
    return model.eval()


def config_of(recipe: Recipe, special: dict[str, int]) -> LswtConfig:
    """A recipe's config, with the ids of special tokens."""
    config = LswtConfig(
        recipe=tables_of(recipe),
        components=describe_components(recipe),
        seq_len=recipe.train.seq_len,
        **special,
    )
    config.max_position_embeddings = config.seq_len + config.memory_length
    return config


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the tokenizer's files."""
    try:
        tokenizer.save(directory)
    except Unsupported as error:
        raise Incompatible(f"the run cannot be exported: {error}") from error


def compare(model: LswtForCausalLM, directory: Path) -> None:
    """Raise CheckpointError unless what was written gives the same logits, bit for bit."""
    ids = torch.randint(
        model.config.vocab_size, (2, PROBE), generator=torch.Generator().manual_seed(0)
    )
    written = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        if not written(ids).logits.equal(model(ids).logits):
            raise CheckpointError(
                "the exported model does not give the logits of the run; nothing was written. This"
                " is a bug: please report it"
            )
