"""Where the runs of ablations are kept: under a hash of everything their numbers depend on, so that
a run is made once, whichever ablation asks for it, and an ablation that was stopped goes on where
it was.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lswt_core
from lswt_core.ablation.outcome import Outcome
from lswt_core.data.corpus import fit_tokenizer
from lswt_core.interfaces import DataSource
from lswt_core.model.code_fingerprint import (
    CodeFingerprint,
    core_libraries,
    fingerprint_component,
    library_versions,
)
from lswt_core.model.components import build_component
from lswt_core.model.embedding_init import load_pretrained
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.recipe import Recipe
from lswt_core.registry import Offer, Registry

logger = logging.getLogger(__name__)
OUTCOME = "outcome.json"
DIVERGED = "diverged"  # how the failure of a run begins that would fail again


class Surroundings(NamedTuple):
    """What a run's numbers depend on besides its recipe."""

    # the CPU's instructions, or the accelerator's name and the libraries that come with it
    device: str
    threads: int

    @classmethod
    def here(cls, device: torch.device, threads: int) -> Surroundings:
        """Those of this machine."""
        if device.type != "cuda":
            return cls(f"{device.type} {torch.backends.cpu.get_cpu_capability()}", threads)
        return cls(
            f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, cuDNN"
            f" {torch.backends.cudnn.version()}",
            threads,
        )


class Keys:
    """The keys of runs: hashes of everything their numbers depend on. What runs have in common is
    looked at once.
    """

    def __init__(self, registry: Registry, surroundings: Surroundings) -> None:
        self.registry, self.surroundings = registry, surroundings
        self.known: dict[str, Any] = {}

    def of(self, recipe: Recipe, backends: Iterable[str]) -> str:
        """The key of a run whose attention some backends compute, which a recipe with "auto" does
        not name.

        Hashed are the resolved recipe; the sources of its components, of what they derive from and
        import, and of the core; the libraries that these import; the text, the tokenizer and the
        pretrained word embeddings; and the machine.
        """
        # "auto" is no component
        offers = [one.offer for one in recipe.components() if one.offer.source]
        offers += [self.registry.find("attention", name) for name in backends]
        codes = {f"{one.kind}/{one.qualified}": self.code(one) for one in offers}
        resolved = recipe.resolved()
        parts = {
            "recipe": recipe.fingerprint(),
            "components": {name: code.sha256 for name, code in codes.items()},
            "core": core_digest(),
            "libraries": self.libraries(
                core_libraries().union(*(code.libraries for code in codes.values()))
            ),
            "text": self.once(
                [resolved["data"], resolved["tokenizer"]], lambda: text_of(recipe, self.registry)
            ),
            "embeddings": self.once(resolved["embedding"], lambda: embeddings_of(recipe)),
            "surroundings": [*self.surroundings, platform.machine(), platform.python_version()],
        }
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def code(self, offer: Offer) -> CodeFingerprint:
        """The code of a component."""
        found: CodeFingerprint = self.once(
            [offer.kind, offer.qualified, offer.module],
            lambda: fingerprint_component(offer, self.registry),
        )
        return found

    def libraries(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The versions of what is installed."""
        found: dict[str, list[str]] = self.once(sorted(names), lambda: library_versions(names))
        return found

    def once(self, about: Any, make: Callable[[], Any]) -> Any:
        """What is made of something, made only once."""
        key = json.dumps(about, sort_keys=True)
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]


def text_of(recipe: Recipe, registry: Registry) -> list[str]:
    """What a recipe reads, and as which tokens."""
    source: DataSource = build_component(registry, recipe.one("data"))
    return [source.fingerprint(), fit_tokenizer(recipe, registry, source).fingerprint()]


def embeddings_of(recipe: Recipe) -> list[str | None]:
    """The pretrained word embeddings that a recipe starts from, and the tokens they are of; nothing
    if it starts at random.
    """
    found = load_pretrained(recipe.embedding)
    if found is None:
        return []
    return [
        found.facts["sha256"],
        sha256(
            json.dumps(found.tokens and dict(found.tokens), sort_keys=True).encode()
        ).hexdigest(),
    ]


@cache
def core_digest() -> str:
    """A hash of this library's own code."""
    found = sha256()
    for path in sorted(Path(lswt_core.__file__).parent.rglob("*.py")):
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
        """What a run came to; None if it has not ended, or failed in a way that another try may
        not.
        """
        found = self.read(key)
        return (
            found
            if found and (found.failure is None or found.failure.startswith(DIVERGED))
            else None
        )

    def read(self, key: str) -> Outcome | None:
        """What a run last wrote of how it ended; None if it wrote nothing, or nothing that can be
        read, which is told.
        """
        path = self.directory(key) / OUTCOME
        try:
            return (
                Outcome.from_json(json.loads(path.read_text(encoding="utf-8")))
                if path.is_file()
                else None
            )
        except (ValueError, TypeError) as error:
            logger.warning("%s is damaged, the run is taken up again: %s", path, error)
            return None


def write_json(path: Path, value: Any) -> None:
    """Write a document that appears whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    write_atomically(path, content)
