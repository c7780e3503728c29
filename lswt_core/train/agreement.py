"""Agreement between data-parallel ranks: before the first step, all must have the same recipe,
code, versions, run directory and checkpoint.
"""

from __future__ import annotations

import json
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

from lswt_core import __version__
from lswt_core.checkpoint import Saved
from lswt_core.checkpoint.compatibility import differences
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import CheckpointError
from lswt_core.model.code_fingerprint import fingerprint_components, fingerprint_core
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

MARKER_PREFIX = ".shared-"  # of a file by which ranks test whether they share a directory
HASH_LENGTH = 12  # characters


def require_same_run(
    world: World, recipe: Recipe, registry: Registry, precision: Precision, directory: Path
) -> None:
    """Raise CheckpointError, on every rank, unless all ranks have the same recipe, code, plugins,
    libraries, precision and run directory.
    """
    if world.size == 1:
        return
    own = {
        "recipe": recipe.resolved(),
        "code": {
            "lswt_core": fingerprint_core(),
            **fingerprint_components(recipe.components(), registry, ()),
        },
        "precision": str(precision.dtype),
        "device": world.device.type,
        "versions": {
            "lswt_core": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "run directory": identify_directory(world, directory),
    }
    require_agreement(world, own)


def require_same_checkpoint(world: World, saved: Saved | None) -> None:
    """Raise CheckpointError, on every rank, unless all ranks resume from the same checkpoint, or
    from none.
    """
    name = "none"
    if saved is not None:
        name = f"{saved.path.name} ({saved.manifest.sha256[:HASH_LENGTH]})"
    require_agreement(world, {"checkpoint": name})


def require_agreement(world: World, own: Mapping[str, Any]) -> None:
    """Raise CheckpointError, on every rank, if the JSON data of a rank differs from rank 0's; the
    message names ranks and keys.
    """
    first, *others = (json.loads(text) for text in world.gather_texts(json.dumps(own)))
    lines = []
    for rank, other in enumerate(others, 1):
        for key, expected, found in differences(first, other):
            lines.append(f"  process {rank}: {key} is {found!r}, but {expected!r} in process 0")
    if lines:
        raise CheckpointError(
            "the processes of this run do not agree, nothing was trained:\n"
            + "\n".join(lines)
            + "\n  fix: give every process the same command, code and libraries, and a run"
            " directory on a file system that all share"
        )


def identify_directory(world: World, directory: Path) -> str:
    """A description of the run directory, equal on all ranks that see rank 0's files in it."""
    own = f"{directory.resolve()} on {socket.gethostname()}"
    token, where = json.loads(world.gather_texts(json.dumps([token_hex(8), own]))[0])
    # a new name, which no file system can have cached as missing
    marker = directory / f"{MARKER_PREFIX}{token}"
    if world.rank == 0:
        marker.touch()
    world.wait()
    seen = marker.exists()
    world.wait()
    if world.rank == 0:
        marker.unlink()
    if seen:
        return str(where)
    return f"another one, {own}"
