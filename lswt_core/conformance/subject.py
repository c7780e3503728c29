"""A component under test: built alone, and in a tiny model among reference partners."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from lswt_core.errors import PluginError
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Component,
    Dims,
    Memory,
    Unsupported,
)
from lswt_core.model.decoder import Decoder
from lswt_core.model.initialise import initialise
from lswt_core.model.spec import DecoderSpec, LayerSpec
from lswt_core.registry import REQUIRED, Offer, Registry

DIMS = Dims(d_model=16, n_heads=2, d_ffn=24, n_layers=2)
SMALL = Dims(d_model=16, n_heads=2, d_ffn=6, n_layers=1)  # for derivatives by differences
VOCAB = 29
REACH = 64  # tokens that memories are to keep: more than any text here has
# whose components are the partners, also where the plugin under test uses their names
CORE = "lswt-core"
PARTNERS = {  # what a component is tested with, by kind
    "positional": "rope",
    "memory": "xl-cache",
    "attention": "eager",
    "qk_norm": "none",
    "ffn": "swiglu",
    "norm": "layernorm",
}
MODEL_KINDS = tuple(PARTNERS)


class Subject:
    """One component class with some options."""

    def __init__(
        self, offer: Offer, component: type[Component], registry: Registry, options: dict[str, Any]
    ) -> None:
        self.offer, self.component, self.registry = offer, component, registry
        self.kind, self.options = offer.kind, options

    def __str__(self) -> str:
        return f"{self.kind}/{self.offer.name}"

    def make(self, *given: Any) -> Any:
        """The component alone, from what the core gives its constructor."""
        missing = [
            o.name
            for o in self.offer.options
            if o.default is REQUIRED and o.name not in self.options
        ]
        if missing:
            raise SkipTest(f"it needs {', '.join(missing)}: give --option {missing[0]}=...")
        return self.component(*given, **self.options)

    def partner(self, kind: str) -> Callable[[Dims], Any]:
        """A reference component of another kind."""
        try:
            found = self.registry.get(kind, f"{CORE}:{PARTNERS[kind]}")
        except PluginError as error:
            raise SkipTest(
                f"the reference {kind} {PARTNERS[kind]!r} is not installed: {error}"
            ) from error
        return partial(found, length=REACH) if kind == "memory" else found

    def memories(self, dims: Dims) -> dict[str, Callable[[Dims], Any]]:
        """What remembers: the component itself if it keeps tokens, with the reference cache beside
        it if it does not.
        """
        if self.kind != "memory":
            return {"xl": self.partner("memory")}
        keeps = self.make(dims).length > 0
        longer = (
            {"length": REACH}
            if keeps and "length" not in self.options and self.has_option("length")
            else {}
        )
        own: dict[str, Callable[[Dims], Any]] = {
            self.offer.name: partial(self.component, **self.options, **longer)
        }
        return own if keeps else own | {"xl": self.partner("memory")}

    def has_option(self, name: str) -> bool:
        """Whether the component has an option."""
        return any(option.name == name for option in self.offer.options)

    def blueprint(self, dims: Dims) -> DecoderSpec:
        """A tiny model of reference components with this one among them."""
        with torch.device("meta"):
            self.make(dims)  # skips where options are missing, rather than deep inside of a model
            parts = {
                kind: self.make if kind == self.kind else self.partner(kind)
                for kind in MODEL_KINDS
                if kind != "memory"
            }
            layer = LayerSpec(
                None,
                self.memories(dims),
                parts["attention"],
                parts["qk_norm"],
                parts["ffn"],
                parts["norm"],
            )
            return DecoderSpec(
                dims, VOCAB, 8, True, parts["positional"], parts["norm"], (layer,) * dims.n_layers
            )

    def empty(self, dims: Dims = DIMS) -> Decoder:
        """The tiny model on the meta device."""
        blueprint = self.blueprint(dims)
        with torch.device("meta"):
            return blueprint.build()

    def decoder(
        self, dims: Dims = DIMS, *, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Decoder:
        """The tiny model with numbers, large enough for attention to be far from uniform."""
        self.require_here(dtype, dims)
        decoder = self.empty(dims).to_empty(device="cpu").to(dtype)
        initialise(decoder, seed=seed, std=0.4)
        return decoder

    def require_here(self, dtype: torch.dtype, dims: Dims = DIMS) -> None:
        """Skip where an attention backend says that it cannot run on the CPU at this precision."""
        if self.kind == "attention":
            backend: AttentionBackend = self.make(dims)
            try:
                backend.require(
                    AttentionRequirements(device="cpu", dtype=dtype, d_head=dims.d_head)
                )
            except Unsupported as reason:
                raise SkipTest(f"it cannot run here: {reason}") from reason

    def layer(self, dims: Dims = DIMS, *, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The component alone, a module with numbers."""
        with torch.device("meta"):
            made: nn.Module = self.make(dims)
        made = made.to_empty(device="cpu").to(dtype)
        initialise(made, seed=0, std=0.4)
        return made

    def owned(self, decoder: Decoder) -> list[tuple[str, nn.Parameter]]:
        """The parameters of the model that are the component's own."""
        own = [
            name for name, module in decoder.named_modules() if isinstance(module, self.component)
        ]
        return [
            (name, p)
            for name, p in decoder.named_parameters()
            if any(name.startswith(f"{path}.") for path in own)
        ]

    @property
    def cut_dependent(self) -> str | None:
        """Why the model's states may depend on how a text is cut into segments; None if they may
        not.
        """
        made = self.make(DIMS)
        if getattr(made, "length_dependent", False):
            return "it depends on how many tokens are attended to (length_dependent)"
        if isinstance(made, Memory) and getattr(made, "blocks_from", None) is not None:
            return "what it keeps depends on where in the text tokens stood (blocks_from)"
        return None


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Ids [rows, length]."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def stream(decoder: Decoder, ids: Tensor, size: int, state: Any = None) -> tuple[Tensor, Any]:
    """States [B, T, M] of ids [B, T] read in segments of some size, and what is remembered at the
    end.
    """
    found = []
    for first in range(0, ids.shape[1], size):
        states, state = decoder(ids[:, first : first + size], state)
        found.append(states)
    return torch.cat(found, dim=1), state


def distance(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinite where one is not a number, 0 where there is
    nothing.
    """
    return (
        0.0
        if a.numel() == b.numel() == 0
        else float((a - b).detach().abs().nan_to_num(nan=torch.inf).max())
    )
