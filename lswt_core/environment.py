"""What a number may depend on besides its recipe: components and their versions, device, machine, libraries."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lswt_core.assemble import Assembled, count_parameters
from lswt_core.parallel import Precision, World
from lswt_core.recipe import Recipe


def environment(recipe: Recipe, built: Assembled, world: World, precision: Precision) -> dict[str, Any]:
    """A run's surroundings, as plain data."""
    chosen = recipe.components()
    return {
        "parameters": count_parameters(built.loss),
        "device": str(world.device),
        "processes": world.size,
        "precision": str(precision.dtype).removeprefix("torch."),
        "attention": {"backend": built.attention, "notes": list(built.notes)},
        "recipe": {"overlay": recipe.overlay, "fingerprint": recipe.fingerprint()},
        "components": {f"{one.kind}.{one.offer.name}": f"{one.offer.distribution} {one.offer.version}" for one in chosen},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "tokenizers", "safetensors")},
    }


def recorded(path: Path, key: str) -> Any:
    """What a run's earlier part has recorded; None if there is no such record. A part that goes on does not do the work again."""
    return json.loads(path.read_text(encoding="utf-8")).get(key) if path.is_file() else None
