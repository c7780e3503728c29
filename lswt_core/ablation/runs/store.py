"""The store of ablation runs: a directory of runs, each named by its cache key.

The key is a hash of everything the run's numbers depend on. So a run is made once, whichever
ablation needs it, and an ablation that was stopped continues.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.runs.surroundings import Surroundings
from lswt_core.data.corpus import fit_tokenizer, text_fingerprint
from lswt_core.data.token_directory import tokenizer_cache
from lswt_core.interfaces import DataSource
from lswt_core.model.code_fingerprint import (
    CodeFingerprint,
    core_libraries,
    fingerprint_component,
    fingerprint_core,
)
from lswt_core.model.components import build_component
from lswt_core.model.embedding_init import load_pretrained
from lswt_core.model.installed_libraries import distribution_version, library_versions
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.recipe import Recipe
from lswt_core.recipe.toml_writer import flat
from lswt_core.registry import Offer, Registry

logger = logging.getLogger(__name__)
OUTCOME, IMPORTS = "outcome.json", "imports.json"
WORKER_LOCK = "worker.lock"  # held from a run's start until its outcome is written
# tables whose files have fingerprints of their own
FINGERPRINTED = ("data", "embedding")
KEY_LENGTH = 20  # hexadecimal digits
DIVERGED = "diverged"  # prefix of failures that a second try would repeat


class CacheKeys:
    """Cache keys of runs; what runs have in common is hashed once."""

    def __init__(
        self, registry: Registry, surroundings: Surroundings, store: RunStore | None = None
    ) -> None:
        """``store``: its runs say what they imported besides (``RunStore.current``)."""
        self.registry, self.surroundings, self.store = registry, surroundings, store
        self.memo: dict[str, Any] = {}

    def of(self, recipe: Recipe, backends: Iterable[str]) -> str:
        """Return the key of a run; ``backends`` are its attention backends, which a recipe with
        "auto" does not name.

        Hashed are the resolved recipe; the sources of its components, of their base classes and
        imports, and of the core; the versions of imported libraries; the text, the tokenizer, the
        pretrained word embeddings, and files that options name; and the machine and environment
        variables.
        """
        resolved = recipe.resolved()
        parts = {
            "recipe": recipe.fingerprint(),
            **self.code_parts(recipe, backends),
            "component files": self.data_parts(recipe),
            "text": self.once(
                [resolved["data"], resolved["tokenizer"]],
                lambda: fingerprint_text(recipe, self.registry),
            ),
            "files": hash_named_files(resolved),
            "embeddings": self.once(resolved["embedding"], lambda: fingerprint_embeddings(recipe)),
            "surroundings": [*self.surroundings, platform.machine(), platform.python_version()],
        }
        key = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
        return key if self.store is None else self.store.current(key)

    def code_parts(self, recipe: Recipe, backends: Iterable[str]) -> dict[str, Any]:
        """Return the parts of a key that are about code."""
        # "auto" is no component and has no source
        offers = [chosen.offer for chosen in recipe.components() if chosen.offer.source]
        offers += [self.registry.find("attention", name) for name in backends]
        codes = {f"{offer.kind}/{offer.qualified}": self.code(offer) for offer in offers}
        libraries = core_libraries().union(*(code.libraries for code in codes.values()))
        return {
            "components": {name: code.sha256 for name, code in codes.items()},
            "core": fingerprint_core(),
            "libraries": self.libraries(libraries),
        }

    def data_parts(self, recipe: Recipe) -> dict[str, str]:
        """Return hashes of the files of components that are no source."""
        offers = [chosen.offer for chosen in recipe.components() if chosen.offer.source]
        return {f"{one.kind}/{one.qualified}": self.code(one).data_sha256 for one in offers}

    def code_of(self, recipe: Recipe, backends: Iterable[str]) -> str:
        """Return a hash of a run's code alone, without files that a component may write itself."""
        parts = json.dumps(self.code_parts(recipe, backends), sort_keys=True)
        return sha256(parts.encode()).hexdigest()[:KEY_LENGTH]

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


def covered_code(recipe: Recipe, registry: Registry) -> tuple[set[Path], set[str]]:
    """Return what a recipe's cache key covers, without the backend that "auto" stands for: source
    files, and top-level names of libraries.
    """
    offers = [chosen.offer for chosen in recipe.components() if chosen.offer.source]
    codes = [fingerprint_component(offer, registry) for offer in offers]
    files = {path for code in codes for path in code.files}
    return files, set(core_libraries().union(*(code.libraries for code in codes)))


def fingerprint_text(recipe: Recipe, registry: Registry) -> list[str]:
    """Return the fingerprints of a recipe's text and tokenizer."""
    source: DataSource = build_component(registry, recipe.one("data"))
    text = text_fingerprint(recipe, source)
    tokenizer = fit_tokenizer(recipe, registry, source, text, tokenizer_cache(recipe))
    return [text, tokenizer.fingerprint()]


def hash_named_files(resolved: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of files that values of a recipe name, by key."""
    tables = {name: table for name, table in resolved.items() if name not in FINGERPRINTED}
    return {
        key: sha256(Path(value).read_bytes()).hexdigest()
        for key, value in flat(tables).items()
        if isinstance(value, str) and value and Path(value).is_file()
    }


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

    def current(self, key: str) -> str:
        """Return the key of the run that can be used for a cache key: another one if the run there
        imported code that its key does not cover, and that has changed since.
        """
        seen = set[str]()
        while key not in seen:
            seen.add(key)
            recorded = self.imports(key)
            now = {
                "files": {path: hash_if_file(Path(path)) for path in recorded["files"]},
                "libraries": versions_now(recorded["libraries"]),
            }
            if now == recorded:
                break
            key = sha256(json.dumps([key, now], sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
        return key

    def imports(self, key: str) -> dict[str, Any]:
        """Return what a run's process imported that its key does not cover (see imported_code)."""
        empty: dict[str, Any] = {"files": {}, "libraries": {}}
        path = self.directory(key) / IMPORTS
        if not path.is_file():
            return empty
        try:
            return empty | dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            logger.warning("%s is damaged, the run is made again: %s", path, error)
            return {"files": {"": "damaged"}, "libraries": {}}

    def outcome(self, key: str) -> Outcome | None:
        """Return the outcome of a run that need not be made again: it finished, or diverged."""
        outcome = self.read(key)
        if outcome is None or outcome.failure is None or outcome.failure.startswith(DIVERGED):
            return outcome
        return None

    def version(self, key: str) -> tuple[int, ...]:
        """Return what tells an outcome file from the one that replaces it; () if there is none."""
        try:
            status = self.directory(key).joinpath(OUTCOME).stat()
        except FileNotFoundError:
            return ()
        return status.st_ino, status.st_mtime_ns

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


def hash_if_file(path: Path) -> str | None:
    """Hash a file's content; None if there is no such file."""
    return sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def versions_now(distributions: Iterable[str]) -> dict[str, list[str]]:
    """Return version and content hash of distributions as they are installed now; those that are
    not are left out.
    """
    versions = {}
    for name in distributions:
        with suppress(PackageNotFoundError):
            versions[name] = distribution_version(name)
    return versions


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document that appears whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
