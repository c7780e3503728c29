"""What a number may depend on besides its recipe: components and their versions, device, machine,
libraries.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lswt_core.device import Precision
from lswt_core.distributed.world import World
from lswt_core.model.build import BuiltModel
from lswt_core.model.parameters import count_parameters
from lswt_core.recipe import Recipe


def environment(
    recipe: Recipe, built: BuiltModel, world: World, precision: Precision
) -> dict[str, Any]:
    """A run's surroundings, as plain data."""
    chosen = recipe.components()
    return {
        "parameters": count_parameters(built.loss),
        "device": str(world.device),
        "processes": world.size,
        "precision": str(precision.dtype).removeprefix("torch."),
        "attention": {"backend": built.attention, "notes": list(built.notes)},
        "recipe": {"overlay": recipe.overlay, "fingerprint": recipe.fingerprint()},
        "components": {
            f"{one.kind}.{one.offer.name}": f"{one.offer.distribution} {one.offer.version}"
            for one in chosen
        },
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": (
            {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "tokenizers", "safetensors")}
        ),
    }


def recorded(path: Path, key: str, notice: Callable[[str], None]) -> Any:
    """What a run's earlier part has recorded; None if there is no such record. A part that goes on
    does not do the work again.

    A record that cannot be read is named through ``notice``, since it is about to be written anew;
    what it said is lost, which is what is returned.
    """
    try:
        return read_record(path).get(key) if path.is_file() else None
    except ValueError as error:
        notice(
            f"{path} is damaged and will be written anew, without what only it knew ({key}):"
            f" {error}"
        )
        return f"lost: {path.name} was damaged"


def read_record(path: Path) -> dict[str, Any]:
    """A record as plain data; raises ValueError where it is damaged."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no table")
    return found


def is_intact(path: Path) -> bool:
    """Whether a record is there and can be read."""
    try:
        return bool(read_record(path))
    except (OSError, ValueError):
        return False
