"""Config of the original authors' checkpoints (github.com/Avelina9X/memory-transformer-pt4) as
tables of a recipe.

Two formats share the model type "lsw_transformer": that of the first release (December 2023:
registers, GELU or SwiGLU) and the repository's later one (other activations, QK norm, dynamic
rotary embedding). Their defaults differ, so missing values are never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lswt_core.errors import CheckpointError

MODEL_TYPE = "lsw_transformer"
DROPOUT_KEYS = {
    "dropout_att_mat",
    "dropout_att_out",
    "dropout_ffn_int",
    "dropout_ffn_out",
    "dropout_layers",
}
REQUIRED_KEYS = (
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
    "rope_base_freq",
)
MODEL_KEYS = {  # keys of config.json that define the model
    *REQUIRED_KEYS,
    *DROPOUT_KEYS,
    "trainable_embeddings",
    "gated_att",
    "init_std",
    "rope_xpos_enabled",
    "rope_xpos_scale",
    "hidden_act",
    "qk_norm",
    "rope_positions",
    "rope_dynamic",
    "rope_ntk_scale",
    "rope_yarn_a",
    "rope_yarn_b",
    "parent_embeddings",
    "recompute_kv",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "model_type",
}
IGNORED_KEYS = {  # keys that do not define the model
    "architectures",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
    "auto_map",
    "gradient_as_bucket_view",
    "pooler_config",
    "tie_word_embeddings",
    "return_dict",
    "output_hidden_states",
    "keys_to_ignore_at_inference",
}
ACTIVATIONS = {  # transformers' name -> ours
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "relu": "relu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "softplus": "softplus",
    "exp": "exp",
    "elu1": "elu1",
    "mish": "mish",
    "linear": "identity",
}


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json of an original checkpoint; raises CheckpointError if it is another model's
    or lacks a required key.
    """
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
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type != MODEL_TYPE:
        raise CheckpointError(
            f"{path} is not of the original code: its model_type is {model_type!r}, not"
            f' "{MODEL_TYPE}"'
        )
    missing = [key for key in REQUIRED_KEYS if key not in config]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: the two formats have different defaults, so"
            " nothing is guessed"
        )
    return config


def recipe_tables(config: Mapping[str, Any], memory_length: int) -> dict[str, Any]:
    """Return the model tables of a recipe for an original config."""
    memory: dict[str, Any] = {"xl": {"use": "xl-cache", "length": memory_length}}
    if config["n_registers"]:
        memory = {"registers": {"count": config["n_registers"]}} | memory
    return {
        "model": {
            **{key: config[key] for key in ("d_model", "n_layers", "n_heads", "d_ffn")},
            "bias": config["enable_bias"],
            "init_std": config.get("init_std", 0.02),
        },
        "embedding": {
            **{key: config[key] for key in ("vocab_size", "d_vocab")},
            "trainable": config.get("trainable_embeddings", True),
        },
        "positional": positional_table(config),
        "memory": memory,
        "qk_norm": {"use": "rms" if config.get("qk_norm", False) else "none"},
        "ffn": feed_forward_table(config),
        "norm": {"use": "layernorm", "eps": 1e-5},
    }


def positional_table(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return [positional]: rotary embedding, with registers positioned as in the original."""
    if config.get("rope_xpos_enabled", False):
        raise CheckpointError(
            "rope_xpos_enabled = true: xPos is not offered here, so the model cannot be rebuilt"
        )
    base, ntk_scale = float(config["rope_base_freq"]), float(config.get("rope_ntk_scale", 1.0))
    common = {"reversed": config["rope_reversed"], "sink_frame": "reference"}
    if not config.get("rope_dynamic", False):
        if ntk_scale != 1.0:
            head_dim = config["d_model"] // config["n_heads"]
            base *= ntk_scale ** (head_dim / (head_dim - 2))
        return {"use": "rope", "base": base, **common}
    if not config.get("rope_positions"):
        raise CheckpointError(
            "rope_dynamic = true needs rope_positions, the length the model was trained on"
        )
    return {
        "use": "rope-dynamic",
        "base": base,
        "trained_length": config["rope_positions"],
        "ntk_scale": ntk_scale,
        "temperature_slope": float(config.get("rope_yarn_a", 0.07)),
        "temperature": float(config.get("rope_yarn_b", 1.0)),
        **common,
    }


def feed_forward_table(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return [ffn]. The first format has no ``hidden_act``: SiLU if gated, else GELU."""
    gated = config["gated_ffn"]
    hidden_act = config.get("hidden_act", "silu" if gated else "gelu")
    if hidden_act not in ACTIVATIONS:
        raise CheckpointError(
            f"hidden_act = {hidden_act!r} is not offered here; offered: {', '.join(ACTIVATIONS)}"
        )
    match gated, ACTIVATIONS[hidden_act]:
        case True, "silu":
            return {"use": "swiglu"}
        case False, "gelu":
            return {"use": "gelu"}
        case _, activation:
            return {"use": "glu" if gated else "mlp", "activation": activation}


def conversion_notes(config: Mapping[str, Any]) -> list[str]:
    """Return what is not carried over, is unknown, or computes different numbers. Raises
    CheckpointError for what the original code refuses.
    """
    if config.get("gated_att", False):
        raise CheckpointError("gated_att = true, which the original code itself refuses")
    return ignored_keys(config) + numeric_differences(config)


def ignored_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys that are unknown or act in training only, as sentences."""
    notes = [
        f"config.json: unknown key {key!r} = {config[key]!r} was ignored"
        for key in config
        if key not in MODEL_KEYS | IGNORED_KEYS
    ]
    notes += [
        f"config.json: {key} = {config[key]} was left out; dropout acts in training only"
        for key in sorted(DROPOUT_KEYS)
        if config.get(key)
    ]
    if config.get("recompute_kv", False):
        notes.append(
            "config.json: recompute_kv acts in training only; here keys and values are cached as"
            " they were computed"
        )
    return notes


def numeric_differences(config: Mapping[str, Any]) -> list[str]:
    """Return the original's numbers that a conversion keeps or changes, as sentences."""
    notes = []
    if config["n_registers"] and config.get("rope_dynamic", False):
        notes.append(
            "the original multiplies register values by the attention temperature, by mistake:"
            " logits differ where it is not 1"
        )
    if config["n_registers"] and config["rope_reversed"]:
        notes.append(
            "with registers and reversed positions the original's logits depend on how a text is"
            ' split into calls; that is reproduced (positional.sink_frame = "reference")'
        )
    return notes
