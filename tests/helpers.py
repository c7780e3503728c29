"""Small models from component classes, for tests of the model side."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lswt_attention import Attention
from lswt_eager import Eager
from lswt_norms import LayerNorm
from lswt_pre_norm import PreNorm
from lswt_qk_norm import NoNorm
from lswt_rope import Rope
from lswt_swiglu import SwiGlu
from lswt_tied import Tied
from torch import Tensor

from lswt_core.interfaces import (
    Component,
    Dims,
    LayerContext,
    Memory,
    MixerParts,
    PositionalEncoding,
)
from lswt_core.model.decoder import Decoder
from lswt_core.model.initialise import initialise
from lswt_core.model.spec import DecoderSpec, LayerSpec
from lswt_core.registry.kinds import KIND_OF_INTERFACE

# tiny tensors are slower on many threads, and sums would depend on their number
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
PLUGINS = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py"))
DIMS = Dims(d_model=16, n_heads=2, d_ffn=24, n_layers=2)
VOCAB = 29
MemoryBuilder = Callable[[Dims], Memory]


def shipped_recipes() -> list[Path]:
    """Return the project's recipes: in a checkout those that git tracks, not a user's own; not
    ladders, which are no recipes.
    """
    command = ["git", "ls-files", "-z", "recipes/**.toml"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    paths = paths or list((ROOT / "recipes").rglob("*.toml"))
    return sorted(path for path in paths if path.parent.name != "ladders")


def slow_unless(kept: Collection[object], values: Iterable[object]) -> list[Any]:
    """Return the parameters of a sweep, all but the kept ones marked slow."""
    parameters = []
    for value in values:
        marks = () if value in kept else pytest.mark.slow
        parameters.append(pytest.param(value, marks=marks))
    return parameters


def offered(*kinds: str) -> list[Any]:
    """Every component class that the plugin folders offer, of these kinds (none: all)."""
    classes = [cls for name in PLUGINS for cls in importlib.import_module(name).lswt_components()]
    return [cls for cls in classes if not kinds or kind_of_class(cls) in kinds]


def kind_of_class(cls: type) -> str:
    """The kind whose interface a component class implements."""
    return next(
        KIND_OF_INTERFACE[base.__name__]
        for base in cls.__mro__
        if base.__name__ in KIND_OF_INTERFACE
    )


def build(
    *,
    dims: Dims = DIMS,
    head: Callable[[Dims], Any] = Tied,
    block: Callable[..., Any] = PreNorm,
    mixer: Callable[..., Any] = Attention,
    positional: Callable[[Dims], Any] = Rope,
    memories: Mapping[str, MemoryBuilder] | None = None,
    attention: Callable[[Dims], Any] = Eager,
    qk_norm: Callable[[Dims], Any] = NoNorm,
    ffn: Callable[[Dims], Any] = SwiGlu,
    norm: Callable[[Dims], Any] = LayerNorm,
    vocab_size: int = VOCAB,
    d_vocab: int = 8,
) -> Decoder:
    """A decoder on the meta device."""
    dims = dims._replace(vocab_size=vocab_size, d_vocab=d_vocab)
    layer = LayerSpec(
        block, mixer, positional, False, memories or {}, attention, qk_norm, ffn, norm
    )
    with torch.device("meta"):
        return DecoderSpec(
            dims=dims,
            trainable=True,
            head=head,
            positional=positional,
            norm=norm,
            layers=(layer,) * dims.n_layers,
        ).build()


def attention_layer(
    memories: Mapping[str, Callable[[Dims], Any]],
    backend: Callable[[Dims], Any] = Eager,
    *,
    mixer: Callable[..., Any] = Attention,
    dims: Dims = DIMS,
    seed: int = 0,
) -> Any:
    """One layer's attention in float64."""
    layer = mixer(dims, MixerParts(memories, backend, NoNorm, Rope)).double()
    initialise(layer, seed=seed, std=0.4)
    return layer


def context_of(
    size: int, positional: PositionalEncoding, first_visible: Tensor | None = None, **carry: Any
) -> LayerContext:
    """The context of a layer for a segment of ``size`` tokens."""
    return LayerContext(torch.arange(size), first_visible, positional, carry)


def tiny(
    *, dtype: torch.dtype = torch.float64, seed: int = 0, std: float = 0.4, **parts: Any
) -> Decoder:
    """A decoder with numbers; ``std`` is large enough for attention to be far from uniform."""
    decoder = build(**parts).to_empty(device="cpu").to(dtype)
    initialise(decoder, seed=seed, std=std)
    return decoder


def tokens(rows: int, length: int, seed: int = 0, size: int = VOCAB) -> Tensor:
    """Random ids [rows, length]."""
    return torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(seed))


def stream(decoder: Decoder, ids: Tensor, size: int, first_visible: Tensor | None = None) -> Tensor:
    """States [B, T, M] of ids [B, T] read in segments of ``size``, memories carried along."""
    state, outputs = None, []
    for first in range(0, ids.shape[1], size):
        borders = None if first_visible is None else first_visible[:, first : first + size] - first
        states, state = decoder(ids[:, first : first + size], state, borders)
        outputs.append(states)
    return torch.cat(outputs, dim=1)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where one is not a number."""
    return float((a - b).detach().abs().nan_to_num(nan=torch.inf).max())


def described(cls: type[Component]) -> str:
    """A test's id for a component class."""
    return f"{kind_of_class(cls)}-{cls.name}"
