"""Swappable components for pretraining and ablating language models of the LSWTransformer family."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

HOMES = {  # what ``lswt_core`` offers besides its modules, imported when it is asked for
    "Recipe": "lswt_core.recipe",
    "Registry": "lswt_core.registry",
    "LswtConfig": "lswt_core.hf.configuration",
    "LswtModel": "lswt_core.hf.modeling",
    "LswtForCausalLM": "lswt_core.hf.modeling",
    "export_run": "lswt_core.hf.export",
    "import_checkpoint": "lswt_core.hf.import_original",
}
__all__ = [*HOMES]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'lswt_core' has no attribute {name!r}")


# by name: the version above must exist before anything here is imported
import_module("lswt_core.hf.announce").announce()
