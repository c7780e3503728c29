"""Exported models of many mixes of components, for the tests of what transformers makes of them."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lswt_core import LswtConfig, LswtForCausalLM, Recipe
from lswt_core.hf.components import describe_components, model_tables
from lswt_core.model.initialise import initialise

NANO: dict[str, Any] = {
    "model": {"d_model": 32, "n_heads": 2, "n_layers": 2},
    "embedding": {"vocab_size": 61, "d_vocab": 24},
    "memory": {"registers": {"count": 3}, "xl": {"use": "xl-cache", "length": 64}},
    "train": {"steps": 1},
}
MIXES: dict[str, dict[str, Any]] = {  # tables over NANO's; None removes one
    "family": {},
    "no-registers": {"memory": {"xl": {"use": "xl-cache", "length": 64}}},
    "short-memory": {"memory": {"registers": {"count": 3}, "xl": {"use": "xl-cache", "length": 5}}},
    "no-memory": {"memory": {"registers": {"count": 2}}},
    "window": {"memory": {"registers": {"count": 3}, "xl": {"use": "window", "length": 5}}},
    "xl-hidden": {
        "memory": {"xl": {"use": "xl-hidden", "length": 64}, "sink": {"use": "sink-logit"}}
    },
    "compressed": {
        "memory": {"sink": {"use": "softmax-off-by-one"}, "xl": {"use": "compressed", "length": 64}}
    },
    "compressing": {"memory": {"xl": {"use": "compressed", "length": 4, "slots": 2, "rate": 3}}},
    "reference-reversed": {"positional": {"use": "rope", "sink_frame": "reference"}},
    "reference-forward": {
        "positional": {"use": "rope", "reversed": False, "sink_frame": "reference"}
    },
    "no-position": {
        "positional": {"use": "none"},
        "norm": {"use": "rmsnorm"},
        "ffn": {"use": "gelu"},
    },
    "other-layers": {
        "qk_norm": {"use": "rms"},
        "ffn": {"use": "glu", "activation": "relu"},
        "model": NANO["model"] | {"bias": False, "d_ffn": 40},
    },
    "shared-expert": {
        "ffn": {
            "use": "shared-expert",
            "shared": {"use": "swiglu", "bias": False},
            "routed": {"use": "gelu"},
        },
        "layers": {"1": {"ffn": {"shared_width": 0.5, "routed": {"use": "swiglu"}}}},
    },
    "frozen": {"embedding": NANO["embedding"] | {"trainable": False}},
    "untied": {
        "head": {"use": "untied"},
        "embedding": NANO["embedding"] | {"trainable": False},
    },
    "soft-cap": {"head": {"use": "soft-cap", "cap": 3.0}},
    "eager": {"attention": {"use": "eager"}},
    "by-layer": {
        "layers": {
            "0": {
                "ffn": {"use": "gelu"},
                "memory": {"registers": False},
                "norm": {"use": "rmsnorm"},
            },
            "1": {
                "positional": {"use": "none"},
                "memory": {"xl": {"length": 40}},
                "attention": {"use": "eager"},
                "qk_norm": {"use": "rms"},
            },
        }
    },
    "gated": {"mixer": {"use": "gated-attention", "granularity": "headwise"}},
    "differential": {"mixer": {"use": "differential-attention"}},
    "latent": {
        "mixer": {"use": "latent-attention", "kv_rank": 8, "q_rank": 12, "d_rope": 4},
        "memory": {"registers": {"count": 3}, "xl": {"use": "xl-hidden", "length": 64}},
    },
    "value-residual": {"mixer": {"use": "value-residual"}},
    "cross-layer": {
        "mixer": {"use": "cross-layer-attention"},
        "layers": {"1": {"mixer": {"keys": "below"}, "memory": {"xl": False}}},
    },
    "grouped": {
        "model": NANO["model"] | {"n_heads": 4, "n_kv_heads": 2},
        "memory": {"xl": {"use": "xl-cache", "length": 64}, "sink": {"use": "sink-logit"}},
    },
    "own-gates": {
        "positional": {"use": "none"},
        "layers": {"every 1": {"positional": {"use": "forgetting"}}},
    },
    "hyper-experts": {
        "block": {"use": "hyper-connections", "streams": 3},
        "ffn": {"use": "moe", "n_experts": 4},
        "model": NANO["model"] | {"d_ffn": 24},
    },
    "other-blocks": {
        "layers": {
            "0": {"block": {"use": "sandwich"}, "ffn": {"use": "token-shift"}},
            "1": {"block": {"use": "post-norm"}, "ffn": {"use": "token-shift"}},
        }
    },
    "recurrent": {
        "layers": {
            "0": {
                "mixer": {"use": "gated-delta-net"},
                "memory": {"registers": False, "xl": False},
            },
        }
    },
    "infini": {
        "mixer": {"use": "infini", "chunk": 64},
        "memory": {},
    },
    "recurrent-tokens": {
        "model": NANO["model"] | {"n_layers": 1},
        "block": {"use": "recurrent-tokens", "tokens": 5, "chunk": 60, "depth": 2},
    },
    "sparse": {"memory": {"xl": {"use": "sparse-xl", "length": 64}}},
    "only-recurrent": {
        "mixer": {"use": "mamba2", "d_state": 8},
        "positional": {"use": "none"},
        "memory": {},
    },
    "stretching": {"positional": {"use": "rope-dynamic", "trained_length": 9, "temperature": 1.1}},
    **{
        name: {"positional": {"use": name}}
        for name in (
            "alibi",
            "cope",
            "log-n",
            "scalable-softmax",
            "t5",
            "xpos",
            "rope-partial",
            "p-rope",
            "rope-pi",
            "rope-ntk",
            "rope-yarn",
        )
    },
}
# logits depend on how the text is cut into calls
CUT_DEPENDENT = ("reference-reversed", "stretching", "short-memory", "compressing")
every_mix = pytest.mark.parametrize("mix", MIXES)


@cache
def _config_of(mix: str) -> LswtConfig:
    recipe = Recipe.from_dict(NANO | MIXES[mix])
    ids = {"bos_token_id": 2, "eos_token_id": 60, "pad_token_id": 1}
    return LswtConfig(recipe=model_tables(recipe), components=describe_components(recipe), **ids)


def config_of(mix: str) -> LswtConfig:
    """The config of a mix of components."""
    return copy.deepcopy(_config_of(mix))


@cache
def _model_of(mix: str, dtype: torch.dtype) -> LswtForCausalLM:
    model = LswtForCausalLM(config_of(mix)).to(dtype).eval()
    initialise(model.model.decoder, seed=3, std=0.4)
    return model


def model_of(mix: str, dtype: torch.dtype = torch.float64) -> LswtForCausalLM:
    """A model whose attention is far from uniform."""
    return copy.deepcopy(_model_of(mix, dtype))


def ids(rows: int = 3, length: int = 12) -> Tensor:
    """Ids that are no special ones."""
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(1))


def cache_of(out: Any) -> Any:
    """What an output remembers, whose name differs between versions of transformers."""
    return out.get("cache") or out.get("past_key_values")


@torch.no_grad()
def logits(model: Any, *arguments: Any, **more: Any) -> Tensor:
    return model(*arguments, **more).logits


def generate(model: Any, inputs: Tensor, **more: Any) -> Tensor:
    """Ten more tokens; none of them ends a text."""
    return model.generate(
        inputs,
        **{"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        | more,
    )
