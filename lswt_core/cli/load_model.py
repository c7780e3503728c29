"""Load a trained model from a run directory or from a directory in the HuggingFace format."""

from __future__ import annotations

from pathlib import Path

from lswt_core.decode.load_run import (
    LoadedModel,
    explain_missing_run,
    is_run_directory,
    load_run,
)
from lswt_core.errors import CheckpointError
from lswt_core.registry import Registry


def load_model(path: Path, registry: Registry) -> LoadedModel:
    """Return the model in a directory; raises CheckpointError if it holds none.

    transformers is imported only for a model in its format.
    """
    if is_run_directory(path):
        return load_run(path, registry).model
    if path.joinpath("config.json").is_file():
        from lswt_core.hf.load import load_exported

        return load_exported(path, registry)
    raise CheckpointError(
        f"{path} holds no model: {explain_missing_run(path)}\n"
        "  fix: name a run directory (--out of the run, or runs/<recipe>), or a directory that"
        " export or import has written"
    )
