"""Where the runs of ablations are kept: under a hash of everything their numbers depend on, so that a run is made once, whichever
ablation asks for it, and an ablation that was stopped goes on where it was.
"""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lswt_core
from lswt_core.ablation.outcome import Outcome
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

OUTCOME = "outcome.json"
DIVERGED = "diverged"  # how the failure of a run begins that would fail again


class Surroundings(NamedTuple):
    """What a run's numbers depend on besides its recipe."""

    device: str  # "cpu", or the accelerator's name
    threads: int

    @classmethod
    def here(cls, device: torch.device, threads: int) -> Surroundings:
        """Those of this machine."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
        return cls(name, threads)


def key_of(recipe: Recipe, registry: Registry, surroundings: Surroundings, text: str) -> str:
    """The hash of a run: resolved recipe, sources of its components and of the core, its ``text``'s fingerprint, machine and torch."""
    used = [one for one in recipe.components() if one.offer.source]  # "auto" is no component
    parts = {
        "recipe": recipe.fingerprint(),
        "components": sorted((one.kind, one.name, digest_of(sources(registry.load(one.offer)))) for one in used),
        "core": core_digest(),
        "text": text,
        "surroundings": [*surroundings, platform.machine(), version("torch")],
    }
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def sources(component: type) -> list[Path]:
    """The files of a component: its module, or its whole package."""
    path = Path(inspect.getfile(component))
    packaged = path.with_name("__init__.py").is_file()
    return sorted(path.parent.rglob("*.py")) if packaged else [path]


@cache
def core_digest() -> str:
    """A hash of this library's own code."""
    return digest_of(sorted(Path(lswt_core.__file__).parent.rglob("*.py")))


def digest_of(paths: Iterable[Path]) -> str:
    """A hash of files' contents."""
    found = sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()


class RunStore:
    """A directory of run directories, named by their keys."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, key: str) -> Path:
        """A run's directory."""
        return self.root / key

    def outcome(self, key: str) -> Outcome | None:
        """What a run came to; None if it has not ended, or failed in a way that another try may not."""
        found = self.read(key)
        return found if found and (found.failure is None or found.failure.startswith(DIVERGED)) else None

    def read(self, key: str) -> Outcome | None:
        """What a run last wrote of how it ended."""
        path = self.directory(key) / OUTCOME
        return Outcome.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Write a document that appears whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
