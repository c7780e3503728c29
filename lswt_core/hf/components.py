"""The components a config names, from the plugins that are installed. An exported model that
carries its own sources has another version of this module, which needs no plugins.
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
from lswt_core.recipe.layer_selectors import LAYERED, LAYERS
from lswt_core.registry import Offer, Registry
from lswt_core.registry.discover import FILE

if TYPE_CHECKING:
    from lswt_core.hf.configuration import LswtConfig

TABLES = ("model", "embedding", *LAYERED, LAYERS)  # of a recipe: what a model is
# a model may be moved: what works here, works there
ANYWHERE: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
KNOWN: ContextVar[Registry | None] = ContextVar("KNOWN", default=None)
logger = logging.getLogger(__name__)


@contextmanager
def known(registry: Registry) -> Iterator[None]:
    """While it lasts, components are looked for in this registry: transformers' classes cannot be
    handed one.
    """
    token = KNOWN.set(registry)
    try:
        yield
    finally:
        KNOWN.reset(token)


def plugins() -> Registry:
    """Where components are looked for: what is installed, unless ``known`` says otherwise."""
    return KNOWN.get() or Registry()


def blueprint(config: LswtConfig) -> DecoderSpec:
    """What the model of a config is built from; raises PluginError if a component is not installed,
    RecipeError if its options are not what it takes.
    """
    registry = plugins()
    require_components(config.components, registry)
    recipe = recipe_of(config, registry)
    for name, found in describe_components(recipe).items():
        told = config.components.get(name)
        if told is not None and told["sha256"] != found["sha256"]:
            there, here = (f"{one['distribution']} {one['version']}" for one in (told, found))
            logger.warning(
                "%s is not what the model was made with (%s then, %s here): its source has changed",
                name,
                there,
                here,
            )
    return build_decoder_spec(recipe, registry, **ANYWHERE)


def recipe_of(config: LswtConfig, registry: Registry) -> Recipe:
    """A config as a recipe, complete and checked."""
    # padding is hidden as other documents are: a choice must be able to
    hidden = config.attention == "auto"
    return Recipe.from_dict(
        {**config.recipe, "train": {"steps": 1, "document_masking": hidden}}, registry=registry
    )


def suitable_backend(config: LswtConfig) -> str:
    """The attention backend that "auto" stands for."""
    registry = plugins()
    return choose_backends(recipe_of(config, registry), registry, **ANYWHERE).automatic.name


def require_components(components: dict[str, dict[str, str]], registry: Registry) -> None:
    """Raise PluginError, with the command that mends it, if some are not installed."""
    missing = []
    for name, told in components.items():
        kind, _, plain = name.partition("/")
        try:
            registry.find(kind, plain)
        except PluginError:
            missing.append((name, told))
    if files := [name for name, told in missing if told["distribution"] == FILE]:
        raise PluginError(
            f"the model needs components of a single file that no package has: {', '.join(files)}\n"
            "  fix: they are in the model's own code; load it with trust_remote_code=True and"
            " without import lswt_core"
        )
    if missing:
        names = ", ".join(
            f"{name} of {told['distribution']} {told['version']}" for name, told in missing
        )
        packages = " ".join(
            sorted({f'"{told["distribution"]}=={told["version"]}"' for _, told in missing})
        )
        raise PluginError(
            f"the model needs components that are not installed here: {names}\n  fix: python -m pip"
            f" install {packages}"
        )


def describe_components(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Distribution, version and sha256 of the source of every component of the model, by
    "kind/name".
    """
    chosen = [one for kind in LAYERED for one in recipe.every(kind)]
    return {
        f"{one.kind}/{one.offer.name}": describe(one.offer) for one in chosen if one.offer.source
    }


def describe(offer: Offer) -> dict[str, str]:
    """Where a component comes from."""
    digest = sha256(Path(offer.source).read_bytes()).hexdigest()
    return {"distribution": offer.distribution, "version": offer.version, "sha256": digest}


def tables_of(recipe: Recipe) -> dict[str, Any]:
    """The model's part of a resolved recipe."""
    resolved = recipe.resolved()
    return {name: resolved[name] for name in TABLES if name in resolved}
