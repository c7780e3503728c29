"""environment.json: what a result may depend on besides its recipe, such as versions of components
and libraries, device and machine.
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
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.recipe import Recipe


def run_environment(
    recipe: Recipe, built: BuiltModel, world: World, precision: Precision, unchecked: bool
) -> dict[str, Any]:
    """The environment of a run, as JSON data. ``unchecked``: components of others were not checked
    before it.
    """
    skipped = recipe.third_party() if unchecked else []
    components = {}
    for chosen in recipe.components():
        offer = chosen.offer
        components[f"{chosen.kind}.{offer.name}"] = f"{offer.distribution} {offer.version}"
    libraries = {name: version(name) for name in ("torch", "tokenizers", "safetensors")}
    return {
        "parameters": count_parameters(built.loss),
        "device": str(world.device),
        "processes": world.size,
        "precision": str(precision.dtype).removeprefix("torch."),
        "attention": {"backend": built.attention, "notes": list(built.notes)},
        "recipe": {"overlay": recipe.overlay, "fingerprint": recipe.fingerprint()},
        "components": components,
        "unchecked": [f"{one.kind}.{one.offer.name}" for one in skipped],
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"python": platform.python_version(), **libraries},
    }


def write_run_records(directory: Path, recipe: Recipe, path: Path, record: dict[str, Any]) -> None:
    """Write the resolved recipe to recipe.toml, and a record of the environment to ``path``."""
    write_atomically(directory / "recipe.toml", recipe.dump().encode())
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def read_recorded(path: Path, key: str, notice: Callable[[str], None]) -> Any:
    """A value of the record that the run wrote before it was resumed; None if there is no record.
    If the record is damaged, ``notice`` prints a warning and a remark takes the value's place.
    """
    if not path.is_file():
        return None
    try:
        return read_record(path).get(key)
    except ValueError as error:
        notice(
            f"{path} is damaged and will be written anew, without what only it knew ({key}):"
            f" {error}"
        )
        return f"lost: {path.name} was damaged"


def read_record(path: Path) -> dict[str, Any]:
    """A record's content. Raises ValueError if it is damaged."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no table")
    return content


def is_intact(path: Path) -> bool:
    """Whether a record exists and can be read."""
    try:
        return bool(read_record(path))
    except (OSError, ValueError):
        return False
