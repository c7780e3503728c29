"""Swappable components for pretraining and ablating language models of the LSWTransformer family.

``import lswt_core`` is fast: it imports neither torch nor transformers. ``import lswt_core.hf``
registers the models with transformers' Auto classes.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

EXPORTS = {  # public name -> the module that defines it, imported on first access
    "Recipe": "lswt_core.recipe",
    "Registry": "lswt_core.registry",
    "LswtConfig": "lswt_core.hf.configuration",
    "LswtModel": "lswt_core.hf.modeling",
    "LswtForCausalLM": "lswt_core.hf.modeling",
    "export_run": "lswt_core.hf.export",
    "import_checkpoint": "lswt_core.hf.import_original",
}
__all__ = [*EXPORTS]


def __getattr__(name: str) -> Any:
    if name in EXPORTS:
        return getattr(import_module(EXPORTS[name]), name)
    raise AttributeError(f"module 'lswt_core' has no attribute {name!r}")
