"""For mixers of the softmax-attention family: QKV projections, memories around them, positional
encoding, and one softmax over all key blocks.

A variant extends ``SoftmaxAttention`` and overrides one of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.errors import Incompatible
from lswt_core.interfaces import (
    Dims,
    KeyValue,
    KVBlock,
    KVProjection,
    LayerContext,
    LayerOutput,
    Memory,
    Mixer,
    MixerParts,
    PositionalEncoding,
    ScoreTransform,
    State,
)
from lswt_core.plugin_api.encoded_blocks import encode_positions
from lswt_core.plugin_api.plain_modules import is_plain_linear

# from so many tokens on, one fused QKV product is faster than three, concatenation included
FUSED_QKV_MIN_TOKENS = 64


class SoftmaxAttention(Mixer):
    """Multi-head attention of one layer, with memories and grouped key/value heads. The steps to
    override, in the order in which ``forward`` takes them: ``key_values``, ``make_key_value``,
    ``carry_up``, ``attend``, ``combine``.
    """

    uses = frozenset({"memory", "attention", "qk_norm", "positional"})
    # Of the scores of all key blocks, sinks included; a mixer that sets it declares its class in
    # ``transforms_scores``.
    transform: ScoreTransform | None = None

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        super().__init__(dims, parts)
        dims = self.head_dims(dims)
        memories = {name: build(dims) for name, build in parts.memories.items()}
        require_one_token_memory(memories)
        self.n_heads, self.n_kv_heads, self.d_head = dims.n_heads, dims.n_kv_heads, dims.d_head
        d_kv = dims.n_kv_heads * dims.d_head
        self.query = nn.Linear(dims.d_model, dims.d_model, bias=dims.bias)
        self.key = nn.Linear(dims.d_model, d_kv, bias=dims.bias)
        self.value = nn.Linear(dims.d_model, d_kv, bias=dims.bias)
        self.output = nn.Linear(dims.d_model, dims.d_model, bias=dims.bias)
        self.query_norm = parts.qk_norm(dims)
        self.key_norm = parts.qk_norm(
            dims._replace(d_model=d_kv, n_heads=dims.n_kv_heads, queries_per_kv=1)
        )
        self.memory = nn.ModuleDict(memories)
        windows = [memory.window for memory in memories.values() if memory.window]
        self.window = min(windows, default=None)
        self.reach = max((memory.length for memory in memories.values()), default=0)
        self.backend = parts.attention(dims)
        # a variant's own positional encoding, set by its constructor; None: the layer's
        self.positional: PositionalEncoding | None = None

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """Attend from normed inputs x [B, T, M]; the state is that of every memory, by name."""
        x = cast_for_autocast(x)  # once, not in each of the three projections
        project = QKVProjection(self, x, context)
        key_values, next_state = self.key_values(x, state or {}, context, project)
        q = self.query_norm(split_heads(project.queries(), self.n_heads))
        attended = self.combine(self.attend(q, key_values, context), x)
        return LayerOutput(self.output(attended.flatten(2)), next_state, self.carry_up(key_values))

    def key_values(
        self, x: Tensor, state: Mapping[str, State], context: LayerContext, project: KVProjection
    ) -> tuple[list[KeyValue], dict[str, State]]:
        """The keys and values to attend to, the new segment's own last, and the memories' next
        state. Calls the memories as middleware around ``project``, the recipe's first outermost.
        """
        wrapped: dict[str, MemoryProjection] = {}
        for name, memory in reversed(list(self.memory.items())):
            wrapped[name] = MemoryProjection(memory, state.get(name), project)
            project = wrapped[name]
        key_values = project(x, context.positions)
        return key_values, {name: one.next_state for name, one in wrapped.items()}

    def make_key_value(
        self, x: Tensor, k: Tensor, v: Tensor, positions: Tensor, context: LayerContext
    ) -> KeyValue:
        """Keys and values [B, N, G, D], as they were projected from x [B, N, M], as a block: keys
        normed. x is the layer's input, or what a memory keeps of earlier ones (xl-hidden).
        """
        features = self.encoding_of(context.positional).features(x)
        return KeyValue(self.key_norm(k), v, positions, features=features)

    def attend(self, q: Tensor, key_values: Sequence[KeyValue], context: LayerContext) -> Tensor:
        """Attend with queries [B, T, H, D]: -> [B, T, H, D]."""
        output: Tensor = self.backend(self.encode(q, key_values, context))
        return output

    def encode(
        self, q: Tensor, key_values: Sequence[KeyValue], context: LayerContext
    ) -> list[KVBlock]:
        """The key blocks with the queries [B, T, H, D] that attend to them, positions encoded. A
        mixer that selects keys replaces ``selected`` of what this returns.
        """
        positions = context.positions
        first_visible = within_window(context, self.window)
        positional = self.encoding_of(context.positional)
        blocks = encode_positions(q, key_values, positions, first_visible, positional)
        if self.transform is None:
            return blocks
        return [block._replace(transform=self.transform) for block in blocks]

    def encoding_of(self, positional: PositionalEncoding) -> PositionalEncoding:
        """The positional encoding of queries and keys: its own, or the layer's."""
        return positional if self.positional is None else self.positional

    def combine(self, attended: Tensor, x: Tensor) -> Tensor:
        """What the output projection gets, from the heads' outputs [B, T, H, D] and the layer's
        normed inputs x [B, T, M]; by default the outputs themselves.
        """
        return attended

    def carry_up(self, key_values: Sequence[KeyValue]) -> Mapping[str, Any]:
        """What the layers above get (``writes``), from the keys and values of this one."""
        return {}


def within_window(context: LayerContext, window: int | None) -> Tensor | None:
    """The first position each query sees, [B or 1, T]: the start of its document or of a window of
    so many tokens, whichever is later. None: no key is hidden.
    """
    first_visible = context.first_visible
    if window is None:
        return first_visible
    window_start = (context.positions - window + 1)[None]  # [1, T]
    return window_start if first_visible is None else first_visible.maximum(window_start)


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[B, N, H * D] -> [B, N, H, D]."""
    return x.unflatten(-1, (n_heads, -1))


class MemoryProjection:
    """A memory around an inner key/value projection: itself a KVProjection, which keeps the
    memory's next state.
    """

    def __init__(self, memory: nn.Module, state: State, inner: KVProjection) -> None:
        self.memory, self.state, self.inner = memory, state, inner
        self.next_state: State = None

    def __call__(self, x: Tensor, positions: Tensor) -> list[KeyValue]:
        """Return the keys and values that the memory offers for x [B, N, M] at positions [N]."""
        key_values, self.next_state = self.memory(x, positions, self.state, self.inner)
        return key_values


class QKVProjection:
    """A layer's key/value projection; for the layer's own inputs, queries come from the same
    fused product where that is faster.
    """

    def __init__(self, layer: SoftmaxAttention, x: Tensor, context: LayerContext) -> None:
        self.layer, self.x, self.context = layer, x, context
        self.fused_queries: Tensor | None = None  # [B, T, M], set by a fused product

    def __call__(self, x: Tensor, positions: Tensor) -> list[KeyValue]:
        """Return keys and values of x [B, N, M] at positions [N]."""
        layer = self.layer
        layers = (layer.query, layer.key, layer.value)
        is_long = x.shape[:-1].numel() >= FUSED_QKV_MIN_TOKENS
        if x is self.x and is_long and all(map(is_plain_linear, layers)):
            self.fused_queries, k, v = fused_linear(x, *layers)
        else:
            k, v = layer.key(x), layer.value(x)
        k, v = split_heads(k, layer.n_kv_heads), split_heads(v, layer.n_kv_heads)
        return [layer.make_key_value(x, k, v, positions, self.context)]

    def queries(self) -> Tensor:
        """Return the queries [B, T, M] of the layer's inputs; call after the keys and values."""
        if self.fused_queries is None:
            return self.layer.query(self.x)
        return self.fused_queries


def fused_linear(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """Outputs of several linear layers of one input x [..., M], by one matrix product."""
    weight = torch.cat([cast_for_autocast(layer.weight) for layer in layers])
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([cast_for_autocast(layer.bias) for layer in layers])
    widths = [layer.out_features for layer in layers]
    return nn.functional.linear(x, weight, bias).split(widths, dim=-1)


def cast_for_autocast(x: Tensor) -> Tensor:
    """Cast to the dtype that autocast multiplies in, as autocast does: float64 is left alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def require_one_token_memory(memories: Mapping[str, Memory]) -> None:
    """Raise Incompatible if several memories of a layer keep tokens: they would enter the softmax
    more than once.
    """
    names = [name for name, memory in memories.items() if memory.length]
    if len(names) > 1:
        listed = " and ".join(f"memory.{name} ({memories[name].name})" for name in names)
        raise Incompatible(
            f"{listed} keep earlier tokens in the same layer, each of which would be"
            " attended to more than once; leave one, the others being removed by e.g."
            f" memory.{names[0]} = false"
        )


@contextmanager
def replace_attention_backends(
    model: nn.Module, substitute: Callable[[SoftmaxAttention], nn.Module]
) -> Iterator[None]:
    """Replace every layer's backend by ``substitute(layer)`` within the context."""
    layers = [module for module in model.modules() if isinstance(module, SoftmaxAttention)]
    backends = [layer.backend for layer in layers]
    for layer in layers:
        layer.backend = substitute(layer)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend
