"""Checkpoints of the original authors' code (github.com/Avelina9X/memory-transformer-pt4), turned
into our format.

Two formats share the model type "lsw_transformer": that of the first release (December 2023:
registers, GELU or SwiGLU) and the repository's later one (other activations, norms of queries and
keys, a rotary embedding that stretches). Values that one of them leaves out are never guessed from
the other's defaults.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from lswt_core.errors import CheckpointError, DataError
from lswt_core.hf.components import describe_components, tables_of
from lswt_core.hf.configuration import LswtConfig
from lswt_core.hf.directory import written_whole
from lswt_core.hf.modeling import LswtForCausalLM
from lswt_core.hf.save import save_model
from lswt_core.plugin_api.hub import hub_options, summarise_error
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

logger = logging.getLogger(__name__)
MODEL_TYPE = "lsw_transformer"
# of a model on the Hub: never pickled weights, never code
FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
DROPOUTS = (
    "dropout_att_mat",
    "dropout_att_out",
    "dropout_ffn_int",
    "dropout_ffn_out",
    "dropout_layers",
)
READ = {  # keys of config.json that decide what the model is
    *(
        "vocab_size",
        "trainable_embeddings",
        "d_vocab",
        "d_model",
        "d_ffn",
        "n_heads",
        "n_layers",
        "n_registers",
        "gated_ffn",
        "gated_att",
    ),
    *(
        "enable_bias",
        "init_std",
        "rope_base_freq",
        "rope_reversed",
        "rope_xpos_enabled",
        "rope_xpos_scale",
        "hidden_act",
        "qk_norm",
    ),
    *(
        "rope_positions",
        "rope_dynamic",
        "rope_ntk_scale",
        "rope_yarn_a",
        "rope_yarn_b",
        "parent_embeddings",
        "recompute_kv",
    ),
    *("pad_token_id", "bos_token_id", "eos_token_id", "model_type", *DROPOUTS),
}
HARMLESS = {  # keys that say nothing about the model
    *(
        "architectures",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "_name_or_path",
        "auto_map",
    ),
    *(
        "gradient_as_bucket_view",
        "pooler_config",
        "tie_word_embeddings",
        "return_dict",
        "output_hidden_states",
        "keys_to_ignore_at_inference",
    ),
}
ACTIVATIONS = {  # transformers' names -> ours
    **{
        name: name
        for name in (
            "silu",
            "gelu",
            "relu",
            "relu2",
            "sigmoid",
            "tanh",
            "softplus",
            "exp",
            "elu1",
            "mish",
        )
    },
    **{
        "swish": "silu",
        "gelu_new": "gelu-tanh",
        "gelu_pytorch_tanh": "gelu-tanh",
        "gelu_python": "gelu",
        "linear": "identity",
    },
}
NAMES = (  # parts of parameter names, theirs -> ours
    ("model.input_embedding.embedding", "vocabulary.table"),
    ("model.input_proj", "vocabulary.input"),
    ("head_proj", "vocabulary.output"),
    ("model.blocks", "blocks"),
    ("model.input_norm", "input_norm.norm"),
    ("model.output_norm", "output_norm.norm"),
    ("att_norm", "attention_norm.norm"),
    ("ffn_norm", "ffn_norm.norm"),
    (".att.proj_q", ".attention.query"),
    (".att.proj_k", ".attention.key"),
    (".att.proj_v", ".attention.value"),
    (".att.proj_o", ".attention.output"),
    (".att.q_norm", ".attention.query_norm"),
    (".att.k_norm", ".attention.key_norm"),
    (".att.registers_k", ".attention.memory.registers.keys"),
    (".att.registers_v", ".attention.memory.registers.values"),
)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


class Imported(NamedTuple):
    """What an import has done."""

    directory: Path
    config: LswtConfig
    # what the reader should know: unknown keys, what was left out, where numbers will differ
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
    """Write the model of ``source``, a directory or a name on the Hub, to the new directory ``out``
    in our format.

    ``memory_length`` is how many tokens the model will remember; their files do not say. ``dtype``
    is what weights are stored in: their files hold float16, and float32 keeps the computation from
    being rounded to it. ``tokenizer``, a name on the Hub or a directory, is put beside a model that
    brings none (they trained with that of ``parent_embeddings``). Raises CheckpointError if the
    source is not such a checkpoint, or has what cannot be rebuilt.
    """
    directory = Path(source) if Path(source).is_dir() else snapshot(str(source), revision)
    config = read_config(directory)
    model, notes = build(config, memory_length)
    weights = read_weights(directory, notes)
    fill(model, weights, getattr(torch, dtype), directory)
    with written_whole(Path(out)) as partial:
        save_model(model, partial)
        if not place_tokenizer(directory, partial, tokenizer):
            parent = config.get("parent_embeddings", "facebook/opt-125m")
            notes.append(
                f"{directory} brings no tokenizer: the original uses that of {parent}; --tokenizer"
                f" {parent} puts it beside the model"
            )
    for note in notes:
        logger.warning(note)
    return Imported(Path(out), model.config, tuple(notes))


def snapshot(name: str, revision: str) -> Path:
    """A model's files from the Hub, downloaded or found in the cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, **hub_options(revision)))
    except Exception as error:  # the library's own and its network client's have no common base
        raise DataError(
            f"{name!r} is neither a directory here nor a model that can be had from the Hub:"
            f" {summarise_error(error)}\n  fix: check the name; without a network download it elsewhere and"
            " give the directory"
        ) from error


def place_tokenizer(directory: Path, out: Path, other: str | None) -> bool:
    """Copy the tokenizer's files, or save another's; whether there is one now."""
    if other is not None:
        Registry().get("tokenizer", "hf")(path=other).save(out)
        return True
    copied = [name for name in TOKENIZER_FILES if (directory / name).is_file()]
    for name in copied:
        shutil.copyfile(directory / name, out / name)
    return bool(copied)


def read_config(directory: Path) -> dict[str, Any]:
    """The config of a checkpoint of theirs."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no config.json: name a directory that save_pretrained has written, or"
            " a model on the Hub"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else None
        raise CheckpointError(
            f'{path} is not of the original code: its model_type is {found!r}, not "{MODEL_TYPE}"'
        )
    needed = (
        "vocab_size",
        "d_vocab",
        "d_model",
        "d_ffn",
        "n_heads",
        "n_layers",
        "n_registers",
        "gated_ffn",
        "enable_bias",
        "rope_reversed",
    )
    missing = [key for key in (*needed, "rope_base_freq") if key not in config]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: the two formats have other defaults, so nothing is"
            " guessed"
        )
    return config


def build(config: Mapping[str, Any], memory_length: int) -> tuple[LswtForCausalLM, list[str]]:
    """The model without numbers, and what to say about it."""
    notes = remarks(config)
    registry = Registry()
    recipe = Recipe.from_dict(
        {**tables(config, memory_length), "train": {"steps": 1}}, registry=registry
    )
    ids = {
        key: config[key]
        for key in ("pad_token_id", "bos_token_id", "eos_token_id")
        if config.get(key) is not None
    }
    with torch.device("meta"):
        ours = LswtConfig(
            recipe=tables_of(recipe),
            components=describe_components(recipe),
            seq_len=memory_length,
            **ids,
        )
        return LswtForCausalLM(ours), notes


def tables(config: Mapping[str, Any], memory_length: int) -> dict[str, Any]:
    """Their config as tables of a recipe."""
    sinks = {"registers": {"count": config["n_registers"]}} if config["n_registers"] else {}
    return {
        "model": (
            {key: config[key] for key in ("d_model", "n_layers", "n_heads", "d_ffn")}
            | {"bias": config["enable_bias"], "init_std": config.get("init_std", 0.02)}
        ),
        "embedding": (
            {key: config[key] for key in ("vocab_size", "d_vocab")}
            | {"trainable": config.get("trainable_embeddings", True)}
        ),
        "positional": positional(config),
        "memory": sinks | {"xl": {"use": "xl-cache", "length": memory_length}},
        "qk_norm": {"use": "rms" if config.get("qk_norm", False) else "none"},
        "ffn": feed_forward(config),
        "norm": {"use": "layernorm", "eps": 1e-5},
    }


def positional(config: Mapping[str, Any]) -> dict[str, Any]:
    """Their rotary embedding, registers met as theirs are."""
    if config.get("rope_xpos_enabled", False):
        raise CheckpointError(
            "rope_xpos_enabled = true: xPos is not offered here, so the model cannot be rebuilt"
        )
    base, stretch = float(config["rope_base_freq"]), float(config.get("rope_ntk_scale", 1.0))
    frame = {"reversed": config["rope_reversed"], "sink_frame": "reference"}
    if not config.get("rope_dynamic", False):
        width = config["d_model"] // config["n_heads"]
        return {
            "use": "rope",
            "base": base * stretch ** (width / (width - 2)) if stretch != 1.0 else base,
        } | frame
    if not config.get("rope_positions"):
        raise CheckpointError(
            "rope_dynamic = true needs rope_positions, the length the model was trained on"
        )
    temper = {
        "temperature_slope": float(config.get("rope_yarn_a", 0.07)),
        "temperature": float(config.get("rope_yarn_b", 1.0)),
    }
    return (
        {
            "use": "rope-dynamic",
            "base": base,
            "trained_length": config["rope_positions"],
            "ntk_scale": stretch,
        }
        | temper
        | frame
    )


def feed_forward(config: Mapping[str, Any]) -> dict[str, Any]:
    """Their feed-forward layer; the first format has no ``hidden_act``, and is SiLU where gated,
    else GELU.
    """
    gated = config["gated_ffn"]
    told = config.get("hidden_act", "silu" if gated else "gelu")
    if told not in ACTIVATIONS:
        raise CheckpointError(
            f"hidden_act = {told!r} is not offered here; offered: {', '.join(ACTIVATIONS)}"
        )
    match gated, ACTIVATIONS[told]:
        case True, "silu":
            return {"use": "swiglu"}
        case False, "gelu":
            return {"use": "gelu"}
        case _, activation:
            return {"use": "glu" if gated else "mlp", "activation": activation}


def remarks(config: Mapping[str, Any]) -> list[str]:
    """What is not carried over, or unknown, or will differ."""
    if config.get("gated_att", False):
        raise CheckpointError("gated_att = true, which the original code itself refuses")
    notes = [
        f"config.json: unknown key {key!r} = {config[key]!r} was ignored"
        for key in config
        if key not in READ | HARMLESS
    ]
    notes += [
        f"config.json: {key} = {config[key]} was left out; it acts in training only"
        for key in DROPOUTS
        if config.get(key)
    ]
    if config.get("recompute_kv", False):
        notes.append(
            "config.json: recompute_kv acts in training only; here keys and values are kept as they"
            " were computed"
        )
    if config["n_registers"] and config.get("rope_dynamic", False):
        notes.append(
            "the original multiplies register values by the attention temperature, by mistake:"
            " logits differ where it is not 1"
        )
    if config["n_registers"] and config["rope_reversed"]:
        notes.append(
            "with registers and reversed positions the original's logits depend on how a text is"
            ' cut into calls; that is reproduced (positional.sink_frame = "reference")'
        )
    return notes


def read_weights(directory: Path, notes: list[str]) -> dict[str, Tensor]:
    """Their tensors under our names."""
    files = weight_files(directory)
    if not files:
        others = ", ".join(path.name for path in sorted(directory.glob("*.bin"))) or "no weights"
        raise CheckpointError(
            f"{directory} holds no .safetensors file but {others}: pickled weights are not read,"
            " since loading them can run code\n  fix: convert them once, with torch.load(...,"
            " weights_only=True) and safetensors.torch.save_file"
        )
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    pooled = [name for name in found if name.startswith("pooler.")]
    if pooled:
        notes.append(
            f"{len(pooled)} tensors of a reward head (pooler.*) were left out: a language model has"
            " none"
        )
    buffers = [name for name in found if name.endswith((".inv_freq", "rope_embedding.scale"))]
    return {
        rename(name): reshape(name, found[name])
        for name in found
        if name not in (*pooled, *buffers)
    }


def weight_files(directory: Path) -> list[Path]:
    """The file of all weights, or those that its index names."""
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        return [
            directory / name
            for name in sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        ]
    return [whole] if whole.is_file() else []


def rename(name: str) -> str:
    """Their name of a parameter in our words."""
    return "model.decoder." + reduce(lambda so_far, pair: so_far.replace(*pair), NAMES, name)


def reshape(name: str, tensor: Tensor) -> Tensor:
    """They keep registers as [1, H, R, D], we as [R, H, D]."""
    return tensor[0].transpose(0, 1).contiguous() if ".registers_" in name else tensor


def fill(
    model: LswtForCausalLM, weights: Mapping[str, Tensor], dtype: torch.dtype, directory: Path
) -> None:
    """Give the model its numbers: all of them, of the right shapes, and no others."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    wrong = [
        f"{name}: {found.get(name, 'missing')}, expected {wanted.get(name, 'none')}"
        for name in differing
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"the weights in {directory} are not those of its config.json:\n  "
            + "\n  ".join(wrong[:5])
            + more
        )
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
