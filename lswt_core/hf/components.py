"""Build a config's model from installed plugins. An exported model that carries its own source has
another version of this module, which needs no plugins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lswt_core.errors import PluginError
from lswt_core.model.attention_choice import choose_backends
from lswt_core.model.build import build_decoder_spec
from lswt_core.model.spec import DecoderSpec
from lswt_core.recipe import Recipe
from lswt_core.recipe.layer_selectors import LAYERS, MODEL_KINDS
from lswt_core.registry import Offer, Registry
from lswt_core.registry.discover import FILE

if TYPE_CHECKING:
    from lswt_core.hf.configuration import LswtConfig

TABLES = ("model", "embedding", *MODEL_KINDS, LAYERS)  # the recipe tables that define a model
# a model may be moved to any device later: a backend that works on CPU in float32 works everywhere
PORTABLE: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
ACTIVE_REGISTRY: ContextVar[Registry | None] = ContextVar("ACTIVE_REGISTRY", default=None)
logger = logging.getLogger(__name__)


@contextmanager
def use_registry(registry: Registry) -> Iterator[None]:
    """Look components up in this registry inside the context: transformers builds model classes
    from a config alone, so it cannot be an argument.
    """
    token = ACTIVE_REGISTRY.set(registry)
    try:
        yield
    finally:
        ACTIVE_REGISTRY.reset(token)


def current_registry() -> Registry:
    """Return the registry of ``use_registry``, or one of all installed plugins."""
    return ACTIVE_REGISTRY.get() or Registry()


def blueprint(config: LswtConfig) -> DecoderSpec:
    """Return the blueprint of a config's model; raises PluginError if a component is not installed,
    RecipeError if it does not take its options.
    """
    registry = current_registry()
    require_components(config.components, registry)
    recipe = recipe_of(config, registry)
    warn_about_changed_sources(config.components, describe_components(recipe))
    return build_decoder_spec(recipe, registry, **PORTABLE)


def warn_about_changed_sources(
    exported: dict[str, dict[str, str]], installed: dict[str, dict[str, str]]
) -> None:
    """Log a warning for each component whose source is not what the model was exported with."""
    for name, here in installed.items():
        there = exported.get(name)
        if there is not None and there["sha256"] != here["sha256"]:
            logger.warning(
                "%s: its source has changed since the model was exported (%s %s then, %s %s here)",
                name,
                there["distribution"],
                there["version"],
                here["distribution"],
                here["version"],
            )


def recipe_of(config: LswtConfig, registry: Registry) -> Recipe:
    """Return a config as a complete, validated recipe."""
    # padding is masked like other documents, which an automatic backend must support
    masking = config.attention == "auto"
    tables = {**config.recipe, "train": {"steps": 1, "document_masking": masking}}
    return Recipe.from_dict(tables, registry=registry)


def resolve_auto_backend(config: LswtConfig) -> str:
    """Return the attention backend that "auto" stands for."""
    registry = current_registry()
    choice = choose_backends(recipe_of(config, registry), registry, **PORTABLE)
    return choice.automatic.name


def require_components(components: dict[str, dict[str, str]], registry: Registry) -> None:
    """Raise PluginError, with the command that installs them, if components are missing."""
    missing = {}
    for name, source in components.items():
        kind, _, use = name.partition("/")
        try:
            registry.find(kind, use)
        except PluginError:
            missing[name] = source
    files = [name for name, source in missing.items() if source["distribution"] == FILE]
    if files:
        raise PluginError(
            f"the model needs components of a single file that no package has: {', '.join(files)}\n"
            "  fix: give generate the file, --plugin FILE; in Python load the model with its own"
            " code, trust_remote_code=True and no import lswt_core.hf"
        )
    if missing:
        names = [f"{n} of {s['distribution']} {s['version']}" for n, s in missing.items()]
        packages = {f'"{s["distribution"]}=={s["version"]}"' for s in missing.values()}
        raise PluginError(
            f"the model needs components that are not installed here: {', '.join(names)}\n"
            f"  fix: python -m pip install {' '.join(sorted(packages))}"
        )


def describe_components(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Return distribution, version and sha256 of the source of each of the model's components, by
    "kind/name".
    """
    outer = [one for kind in MODEL_KINDS for one in recipe.every(kind)]
    chosen = [inner for one in outer for inner in one.with_inner()]
    return {
        f"{one.kind}/{one.offer.name}": describe_source(one.offer)
        for one in chosen
        if one.offer.source
    }


def describe_source(offer: Offer) -> dict[str, str]:
    """Return distribution, version and sha256 of a component's source file."""
    digest = sha256(Path(offer.source).read_bytes()).hexdigest()
    return {"distribution": offer.distribution, "version": offer.version, "sha256": digest}


def model_tables(recipe: Recipe) -> dict[str, Any]:
    """Return the tables of a resolved recipe that define the model."""
    resolved = recipe.resolved()
    return {name: resolved[name] for name in TABLES if name in resolved}
