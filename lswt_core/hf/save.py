"""A model written so that anybody can load it: weights, config and, where every component is this
library's own, its code.
"""

from __future__ import annotations

from pathlib import Path

from lswt_core.hf.modeling import LswtForCausalLM
from lswt_core.hf.source_bundle import AUTO_MAP, sources


def save_model(model: LswtForCausalLM, directory: Path) -> bool:
    """Write a model; returns whether its code could come along, so that it loads without this
    library.
    """
    files = sources(model.config)
    if files is not None:
        model.config.auto_map = dict(AUTO_MAP)
    model.save_pretrained(directory)
    for name, text in (files or {}).items():
        directory.joinpath(name).write_text(text, encoding="utf-8")
    return files is not None
