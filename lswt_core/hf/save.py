"""Save a model with weights, config and, if every component is this library's own, its code."""

from __future__ import annotations

from pathlib import Path

from lswt_core.hf.modeling import LswtForCausalLM
from lswt_core.hf.source_bundle import AUTO_MAP, bundle_sources
from lswt_core.hf.weight_files import WHOLE, ConvertedTensors, write_weights


def save_model(model: LswtForCausalLM, directory: Path) -> bool:
    """Write a model; return whether its code is included, so that it loads without this library."""
    has_code = save_code(model, directory)
    model.save_pretrained(directory)
    return has_code


def save_streamed(
    model: LswtForCausalLM,
    tensors: ConvertedTensors,
    directory: Path,
    max_file_size: str | int,
) -> bool:
    """``save_model`` of a model on the meta device, whose tensors are read one by one."""
    has_code = save_code(model, directory)
    model.save_pretrained(directory, state_dict={})  # config and generation config
    directory.joinpath(WHOLE).unlink(missing_ok=True)  # which holds no tensor
    write_weights(directory, tensors, max_file_size)
    return has_code


def save_code(model: LswtForCausalLM, directory: Path) -> bool:
    """Write a model's code and name it in the config, if every component is this library's own;
    return whether it is.
    """
    sources = bundle_sources(model.config)
    if sources is None:
        return False
    model.config.auto_map = dict(AUTO_MAP)
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in sources.items():
        directory.joinpath(name).write_text(text, encoding="utf-8")
    return True
