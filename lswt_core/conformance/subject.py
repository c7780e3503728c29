"""The component under test: built alone, and in a tiny model with reference components."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from lswt_core.conformance.inner_components import (
    CORE,
    as_tables,
    constructor_options,
    reference_options,
)
from lswt_core.conformance.tensors import VOCAB_SIZE
from lswt_core.errors import PluginError
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Component,
    Dims,
    LayerContext,
    Memory,
    StatefulFeedForward,
    Unsupported,
)
from lswt_core.model.decoder import EMBEDDINGS, IDS, Decoder
from lswt_core.model.initialise import initialise
from lswt_core.model.spec import DecoderSpec, LayerSpec
from lswt_core.registry import REQUIRED, Offer, Registry

DIMS = Dims(16, n_heads=2, d_ffn=24, n_layers=2, vocab_size=VOCAB_SIZE, d_vocab=8)
GRADCHECK_DIMS = DIMS._replace(d_ffn=6, n_layers=1)
MEMORY_LENGTH = 64  # tokens, more than any test sequence has
REFERENCES = {  # by kind: what a component is tested with
    "head": "tied",
    "block": "pre-norm",
    "mixer": "attention",
    "positional": "rope",
    "memory": "xl-cache",
    "attention": "eager",
    "qk_norm": "none",
    "ffn": "swiglu",
    "norm": "layernorm",
}
MODEL_KINDS = tuple(REFERENCES)
LAYER_KINDS = ("block", "mixer", "ffn")  # they return LayerOutput
STATE_KINDS = (*LAYER_KINDS, "memory")


class Subject:
    """A component class under test, with the options to build it with."""

    def __init__(
        self, offer: Offer, component: type[Component], registry: Registry, options: dict[str, Any]
    ) -> None:
        self.offer, self.component, self.registry = offer, component, registry
        self.kind = offer.kind
        self.options = {**reference_options(offer, REFERENCES), **as_tables(offer, options)}
        self.memory_length = MEMORY_LENGTH  # tokens in the tiny model's KV cache; 0: it has none

    def __str__(self) -> str:
        return f"{self.kind}/{self.offer.name}"

    def build(self, *arguments: Any) -> Any:
        """Build the component alone; ``arguments`` are what the core passes to the constructor.
        Raises SkipTest if a required option is missing.
        """
        missing = [
            option.name
            for option in self.offer.options
            if option.default is REQUIRED and option.name not in self.options
        ]
        if missing:
            raise SkipTest(f"it needs {', '.join(missing)}: give --option {missing[0]}=...")
        return self.construct(*arguments)

    def construct(self, *arguments: Any, **defaults: Any) -> Any:
        """Call the constructor; ``defaults`` are options that the subject may have already."""
        options = {**defaults, **self.options}
        values = constructor_options(self.registry, self.offer, options, *arguments)
        return self.component(*arguments, **values)

    def build_alone(self, dims: Dims) -> Any:
        """Build a component of the model with the sizes, and the parts that it is made of."""
        if self.kind == "block":
            return self.build(dims, self.layer_spec(dims).block_parts())
        if self.kind == "mixer":
            return self.build(dims, self.layer_spec(dims).mixer_parts())
        return self.build(dims)

    def with_memory_length(self, length: int) -> Subject:
        """The same component in a model whose KV cache has another length, 0 for none."""
        other = Subject(self.offer, self.component, self.registry, self.options)
        other.memory_length = length
        return other

    def with_options(self, options: dict[str, Any]) -> Subject:
        """The same component with other values of some options."""
        return Subject(self.offer, self.component, self.registry, self.options | options)

    @property
    def is_stateful_ffn(self) -> bool:
        """Whether it is a feed-forward layer that is called with state and context."""
        return issubclass(self.component, StatefulFeedForward)

    def has_option(self, name: str) -> bool:
        """Whether the component has an option."""
        return any(option.name == name for option in self.offer.options)

    def reference(self, kind: str) -> Callable[[Dims], Any]:
        """The constructor of the reference component of a kind."""
        try:
            component = self.registry.get(kind, f"{CORE}:{REFERENCES[kind]}")
        except PluginError as error:
            raise SkipTest(
                f"the reference {kind} {REFERENCES[kind]!r} is not installed: {error}"
            ) from error
        if kind == "memory":
            return partial(component, length=self.memory_length)
        return component

    def memories(self, dims: Dims) -> dict[str, Callable[[Dims], Any]]:
        """The memories of the tiny model: the component itself if it is one, and the reference KV
        cache unless the component keeps tokens.
        """
        if self.kind == "mixer" and "memory" not in self.component.uses:  # type: ignore[attr-defined]
            return {}
        if self.kind != "memory":
            return {"xl": self.reference("memory")} if self.memory_length else {}
        keeps_tokens = self.build(dims).length > 0
        defaults = {}
        if keeps_tokens and self.has_option("length"):
            defaults["length"] = self.memory_length
        memories = {self.offer.name: partial(self.construct, **defaults)}
        if not keeps_tokens:
            memories["xl"] = self.reference("memory")  # type: ignore[assignment]
        return memories  # type: ignore[return-value]

    def builder(self, kind: str) -> Callable[..., Any]:
        """The constructor of the tiny model's component of a kind."""
        return self.build if kind == self.kind else self.reference(kind)

    def layer_spec(self, dims: Dims) -> LayerSpec:
        """The specification of a layer: reference components and the one under test."""
        return LayerSpec(
            block=self.builder("block"),
            mixer=self.builder("mixer"),
            positional=self.builder("positional"),
            has_own_positional=False,
            memories=self.memories(dims),
            attention=self.builder("attention"),
            qk_norm=self.builder("qk_norm"),
            ffn=self.builder("ffn"),
            norm=self.builder("norm"),
        )

    def blueprint(self, dims: Dims) -> DecoderSpec:
        """The specification of a tiny model: reference components and the one under test."""
        with torch.device("meta"):
            if self.kind in MODEL_KINDS:
                self.build_alone(dims)  # skips here, rather than deep inside of a model
            layers = (self.layer_spec(dims),) * dims.n_layers
        return DecoderSpec(
            dims=dims,
            trainable=True,
            head=self.builder("head"),
            positional=self.builder("positional"),
            norm=self.builder("norm"),
            layers=layers,
        )

    def meta_decoder(self, dims: Dims = DIMS) -> Decoder:
        """The tiny model on the meta device."""
        blueprint = self.blueprint(dims)
        with torch.device("meta"):
            return blueprint.build()

    def decoder(
        self, dims: Dims = DIMS, *, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> Decoder:
        """The tiny model with initial values large enough for attention to be far from uniform."""
        self.require_cpu(dtype, dims)
        decoder = self.meta_decoder(dims)
        require_self_contained(decoder)
        decoder = decoder.to_empty(device="cpu").to(dtype)
        initialise(decoder, seed=seed, std=0.4)
        return decoder

    def require_cpu(self, dtype: torch.dtype, dims: Dims = DIMS) -> None:
        """Raise SkipTest for an attention backend that does not run on the CPU in a dtype."""
        if self.kind == "attention":
            backend: AttentionBackend = self.build(dims)
            try:
                backend.require(AttentionRequirements("cpu", dtype, dims.d_head))
            except Unsupported as reason:
                raise SkipTest(f"it cannot run here: {reason}") from reason

    def module(self, dims: Dims = DIMS, *, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The component alone, initialised."""
        with torch.device("meta"):
            module: nn.Module = self.build_alone(dims)
        module = module.to_empty(device="cpu").to(dtype)
        initialise(module, seed=0, std=0.4)
        return module

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The output of a norm or feed-forward layer alone for x [B, T, ...], as at the start of a
        text.
        """
        if not isinstance(layer, StatefulFeedForward):
            output: Tensor = layer(x)
            return output
        ids = torch.zeros(x.shape[:2], dtype=torch.int64)
        positional = self.reference("positional")(DIMS)
        carry = {"ids": ids, "embeddings": x}
        return layer(x, None, LayerContext(torch.arange(x.shape[1]), None, positional, carry)).x

    def own_modules(self, decoder: Decoder) -> list[nn.Module]:
        """The model's modules that are the component."""
        return [module for module in decoder.modules() if isinstance(module, self.component)]

    def own_parameters(self, decoder: Decoder) -> list[tuple[str, nn.Parameter]]:
        """The model's parameters that belong to the component, with their names."""
        prefixes = tuple(
            f"{name}."
            for name, module in decoder.named_modules()
            if isinstance(module, self.component)
        )
        return [item for item in decoder.named_parameters() if item[0].startswith(prefixes)]

    @property
    def segment_dependent(self) -> str | None:
        """Why the model's states may depend on how a text is split into segments; None if they
        must not.
        """
        component = self.build_alone(DIMS)
        if getattr(component, "length_dependent", False):
            return "it depends on how many tokens are attended to (length_dependent)"
        if isinstance(component, Memory) and component.position_dependent_from is not None:
            return "its state depends on absolute positions (position_dependent_from)"
        return None


def require_self_contained(decoder: Decoder) -> None:
    """Raise SkipTest if a layer reads what another component must write."""
    layers = list(decoder.layers())
    written = {IDS, EMBEDDINGS}.union(*(layer.writes for layer in layers))
    for layer in layers:
        if missing := sorted(layer.reads - written):
            raise SkipTest(f"it reads {missing[0]!r}, which another component writes")
