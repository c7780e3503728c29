"""The check that a model with the component can be saved and loaded in HuggingFace's format."""

from __future__ import annotations

import warnings
from tempfile import TemporaryDirectory
from typing import Any
from unittest import SkipTest

import torch

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, MODEL_KINDS, Subject
from lswt_core.conformance.tensors import VOCAB_SIZE, random_tokens
from lswt_core.errors import PluginError
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KINDS


@rule(
    "huggingface",
    MODEL_KINDS,
    why=(
        "models are published in HuggingFace's format, which rebuilds them from the recipe's tables"
        " and a state dict"
    ),
    fix=(
        "let the options determine all that the component needs, and keep learned numbers in"
        " parameters or persistent buffers"
    ),
    after=("state dict", "options"),
)
def survives_save_pretrained(subject: Subject) -> None:
    """save_pretrained and from_pretrained give the same logits, bit by bit."""
    from lswt_core.hf.components import describe_components, model_tables
    from lswt_core.hf.configuration import LswtConfig
    from lswt_core.hf.modeling import LswtForCausalLM

    subject.require_cpu(torch.float32)
    require_installed(subject)
    recipe = Recipe.from_dict(recipe_tables(subject))
    config = LswtConfig(recipe=model_tables(recipe), components=describe_components(recipe))
    model = LswtForCausalLM(config).eval()
    ids = random_tokens(2, 6)
    with TemporaryDirectory() as directory, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
        loaded = LswtForCausalLM.from_pretrained(directory).eval()
        same = torch.equal(model(ids).logits, loaded(ids).logits)
    require(same, "logits differ after saving and loading")


def require_installed(subject: Subject) -> None:
    """Raise SkipTest unless the component's name refers to it among installed plugins, where a
    loaded model looks it up.
    """
    try:
        offer = Registry().find(subject.kind, subject.offer.name)
    except PluginError as error:
        raise SkipTest(
            "a model can only be loaded where the component is installed: pip install -e its"
            " package"
        ) from error
    if offer.module != subject.offer.module:
        raise SkipTest(
            f"{subject} is installed from {offer.distribution} {offer.version}, which is another"
            " component"
        )


def recipe_tables(subject: Subject) -> dict[str, Any]:
    """The recipe of a tiny model with the component."""
    kind = KINDS[subject.kind]
    component: dict[str, Any] = {"use": subject.offer.name, **subject.options}
    if kind.many:
        component = {"tested": component}
    return {
        "model": {
            "d_model": DIMS.d_model,
            "n_heads": DIMS.n_heads,
            "n_layers": DIMS.n_layers,
            "d_ffn": DIMS.d_ffn,
        },
        "embedding": {"vocab_size": VOCAB_SIZE, "d_vocab": 8},
        "train": {"steps": 1},
        kind.table: component,
    }
