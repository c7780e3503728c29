"""The store of ablation runs: a directory of runs, each named by its cache key.

The key is a hash of everything the run's numbers depend on. So a run is made once, whichever
ablation needs it, and an ablation that was stopped continues.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.data.corpus import fit_tokenizer, text_fingerprint
from lswt_core.data.token_directory import tokenizer_cache
from lswt_core.interfaces import DataSource
from lswt_core.model.code_fingerprint import (
    CodeFingerprint,
    core_libraries,
    fingerprint_component,
    fingerprint_core,
    library_versions,
)
from lswt_core.model.components import build_component
from lswt_core.model.embedding_init import load_pretrained
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.recipe import Recipe
from lswt_core.registry import Offer, Registry

logger = logging.getLogger(__name__)
OUTCOME = "outcome.json"
DIVERGED = "diverged"  # prefix of failures that a second try would repeat


class Surroundings(NamedTuple):
    """The part of the machine that a run's numbers depend on."""

    device: str  # the CPU's instruction set, or the accelerator's name and its libraries
    threads: int

    @classmethod
    def here(cls, device: torch.device, threads: int) -> Surroundings:
        """Return those of this machine."""
        if device.type != "cuda":
            return cls(f"{device.type} {torch.backends.cpu.get_cpu_capability()}", threads)
        cuda, cudnn = torch.version.cuda, torch.backends.cudnn.version()
        name = torch.cuda.get_device_name(device)
        return cls(f"{name}, CUDA {cuda}, cuDNN {cudnn}", threads)


class CacheKeys:
    """Cache keys of runs; what runs have in common is hashed once."""

    def __init__(self, registry: Registry, surroundings: Surroundings) -> None:
        self.registry, self.surroundings = registry, surroundings
        self.memo: dict[str, Any] = {}

    def of(self, recipe: Recipe, backends: Iterable[str]) -> str:
        """Return the key of a run; ``backends`` are its attention backends, which a recipe with
        "auto" does not name.

        Hashed are the resolved recipe; the sources of its components, of their base classes and
        imports, and of the core; the versions of imported libraries; the text, the tokenizer and
        the pretrained word embeddings; and the machine.
        """
        # "auto" is no component and has no source
        offers = [chosen.offer for chosen in recipe.components() if chosen.offer.source]
        offers += [self.registry.find("attention", name) for name in backends]
        codes = {f"{offer.kind}/{offer.qualified}": self.code(offer) for offer in offers}
        libraries = core_libraries().union(*(code.libraries for code in codes.values()))
        resolved = recipe.resolved()
        parts = {
            "recipe": recipe.fingerprint(),
            "components": {name: code.sha256 for name, code in codes.items()},
            "core": fingerprint_core(),
            "libraries": self.libraries(libraries),
            "text": self.once(
                [resolved["data"], resolved["tokenizer"]],
                lambda: fingerprint_text(recipe, self.registry),
            ),
            "embeddings": self.once(resolved["embedding"], lambda: fingerprint_embeddings(recipe)),
            "surroundings": [*self.surroundings, platform.machine(), platform.python_version()],
        }
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def code(self, offer: Offer) -> CodeFingerprint:
        """Return the code of a component."""
        about = [offer.kind, offer.qualified, offer.module]
        code: CodeFingerprint = self.once(
            about, lambda: fingerprint_component(offer, self.registry)
        )
        return code

    def libraries(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return the versions of installed libraries."""
        versions: dict[str, list[str]] = self.once(sorted(names), lambda: library_versions(names))
        return versions

    def once(self, about: Any, compute: Callable[[], Any]) -> Any:
        """Return the result of ``compute``, which is called once for each JSON value ``about``."""
        key = json.dumps(about, sort_keys=True)
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]


def fingerprint_text(recipe: Recipe, registry: Registry) -> list[str]:
    """Return the fingerprints of a recipe's text and tokenizer."""
    source: DataSource = build_component(registry, recipe.one("data"))
    text = text_fingerprint(recipe, source)
    tokenizer = fit_tokenizer(recipe, registry, source, text, tokenizer_cache(recipe))
    return [text, tokenizer.fingerprint()]


def fingerprint_embeddings(recipe: Recipe) -> list[str | None]:
    """Return hashes of the pretrained word embeddings that a recipe starts from and of their
    vocabulary; empty if it starts from random values.
    """
    embeddings = load_pretrained(recipe.embedding)
    if embeddings is None:
        return []
    vocabulary = json.dumps(embeddings.tokens and dict(embeddings.tokens), sort_keys=True)
    return [embeddings.facts["sha256"], sha256(vocabulary.encode()).hexdigest()]


class RunStore:
    """A directory of run directories, named by their cache keys."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, key: str) -> Path:
        """Return a run's directory."""
        return self.root / key

    def outcome(self, key: str) -> Outcome | None:
        """Return the outcome of a run that need not be made again: it finished, or diverged."""
        outcome = self.read(key)
        if outcome is None or outcome.failure is None or outcome.failure.startswith(DIVERGED):
            return outcome
        return None

    def read(self, key: str) -> Outcome | None:
        """Return the outcome that a run wrote last; None if it wrote none. A damaged one counts as
        none, with a warning.
        """
        path = self.directory(key) / OUTCOME
        if not path.is_file():
            return None
        try:
            return Outcome.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            logger.warning("%s is damaged, the run is taken up again: %s", path, error)
            return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document that appears whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
