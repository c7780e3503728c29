"""Save a model with weights, config and, if every component is this library's own, its code."""

from __future__ import annotations

from pathlib import Path

from lswt_core.hf.modeling import LswtForCausalLM
from lswt_core.hf.source_bundle import AUTO_MAP, bundle_sources


def save_model(model: LswtForCausalLM, directory: Path) -> bool:
    """Write a model; return whether its code is included, so that it loads without this library."""
    sources = bundle_sources(model.config)
    if sources is not None:
        model.config.auto_map = dict(AUTO_MAP)
    model.save_pretrained(directory)
    for name, text in (sources or {}).items():
        directory.joinpath(name).write_text(text, encoding="utf-8")
    return sources is not None
