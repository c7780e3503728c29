"""The processes of a run must mean one and the same run: what each has before it is compared before
the first step.
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

from lswt_core.checkpoint import Saved
from lswt_core.checkpoint.train_state import differences
from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.errors import CheckpointError
from lswt_core.model.code_fingerprint import fingerprint_components, fingerprint_core
from lswt_core.recipe import Recipe

# how a file begins that the first process puts into the run directory for the others to find
MARK = ".shared-"
SHOWN = 12  # characters of a hash


def require_one_run(world: World, recipe: Recipe, precision: Precision, directory: Path) -> None:
    """Raise CheckpointError, in every process, unless all have one recipe, code, plugins,
    libraries, precision and run directory.
    """
    if world.size == 1:
        return
    mine = {
        "recipe": recipe.resolved(),
        "code": fingerprint_code(recipe),
        "precision": str(precision.dtype),
        "device": world.device.type,
    }
    mine["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    require_agreement(world, mine | {"run directory": directory_of(world, directory)})


def require_one_checkpoint(world: World, saved: Saved | None) -> None:
    """Raise CheckpointError, in every process, unless all continue from one checkpoint, or from
    none.
    """
    found = "none" if saved is None else f"{saved.path.name} ({saved.manifest.sha256[:SHOWN]})"
    require_agreement(world, {"checkpoint": found})


def require_agreement(world: World, mine: Mapping[str, Any]) -> None:
    """Raise CheckpointError, in every process, naming each that has other plain data than the
    first, and what differs.
    """
    first, *others = (json.loads(text) for text in world.gather_texts(json.dumps(mine)))
    lines = [
        f"  process {rank}: {key} is {there!r}, but {here!r} in process 0"
        for rank, other in enumerate(others, 1)
        for key, here, there in differences(first, other)
    ]
    if lines:
        raise CheckpointError(
            "the processes of this run do not agree, nothing was trained:\n"
            + "\n".join(lines)
            + "\n  fix: give every process the same command, code and libraries, and a run"
            " directory on a file system that all share"
        )


def directory_of(world: World, directory: Path) -> str:
    """The run directory of the first process, if this one sees there what the first has just
    written; else its own.
    """
    own = f"{directory.resolve()} on {socket.gethostname()}"
    token, where = json.loads(world.gather_texts(json.dumps([token_hex(8), own]))[0])
    # a name that no process has asked its file system for before
    mark = directory / f"{MARK}{token}"
    if world.rank == 0:
        mark.touch()
    world.wait()
    seen = mark.exists()
    world.wait()
    if world.rank == 0:
        mark.unlink()
    return where if seen else f"another one, {own}"


def fingerprint_code(recipe: Recipe) -> dict[str, str]:
    """Hashes of this library's source and of every component's, with its package's version."""
    components = fingerprint_components(recipe, recipe.registry, backends=())
    plugins = {
        name: f"{one['distribution']} {one['version']} {one['sha256'][:SHOWN]}"
        for name, one in components.items()
    }
    return {"lswt_core": fingerprint_core()[:SHOWN]} | plugins
