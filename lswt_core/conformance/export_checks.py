"""The check that a component survives HuggingFace's format."""

from __future__ import annotations

import warnings
from tempfile import TemporaryDirectory
from typing import Any
from unittest import SkipTest

import torch

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, MODEL_KINDS, VOCAB, Subject, tokens
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
    mend=(
        "let options say all that the component needs, and keep every learned number in parameters"
        " or persistent buffers"
    ),
    after=("state dict", "options"),
)
def published(subject: Subject) -> None:
    """A model that is saved and loaded as transformers do gives the same logits, bit by bit."""
    from lswt_core.hf.components import describe_components, model_tables
    from lswt_core.hf.configuration import LswtConfig
    from lswt_core.hf.modeling import LswtForCausalLM

    subject.require_here(torch.float32)
    require_installed(subject)
    recipe = Recipe.from_dict(tables(subject))
    model = LswtForCausalLM(
        LswtConfig(recipe=model_tables(recipe), components=describe_components(recipe))
    ).eval()
    ids = tokens(2, 6)
    with TemporaryDirectory() as directory, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
        loaded = LswtForCausalLM.from_pretrained(directory).eval()
        require(
            torch.equal(model(ids).logits, loaded(ids).logits),
            "logits differ after saving and loading",
        )


def require_installed(subject: Subject) -> None:
    """Skip unless the component is what its name stands for among installed plugins, where models
    look for it.
    """
    try:
        found = Registry().find(subject.kind, subject.offer.name)
    except PluginError as error:
        raise SkipTest(
            "a model can only be loaded where the component is installed: pip install -e its"
            " package"
        ) from error
    if found.module != subject.offer.module:
        raise SkipTest(
            f"{subject} is installed from {found.distribution} {found.version}, which is another"
            " component"
        )


def tables(subject: Subject) -> dict[str, Any]:
    """A recipe of a tiny model with the component in it."""
    shape = {
        "d_model": DIMS.d_model,
        "n_heads": DIMS.n_heads,
        "n_layers": DIMS.n_layers,
        "d_ffn": DIMS.d_ffn,
    }
    own = {"use": subject.offer.name, **subject.options}
    kind = KINDS[subject.kind]
    chosen = {kind.table: {"tested": own} if kind.many else own}
    return {
        "model": shape,
        "embedding": {"vocab_size": VOCAB, "d_vocab": 8},
        "train": {"steps": 1},
        **chosen,
    }
