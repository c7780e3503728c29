"""Softmax attention of one layer: projections, memories, positional encoding, and one softmax over
the union of key blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lswt_core.errors import Incompatible
from lswt_core.interfaces import (
    AttentionBackend,
    Dims,
    KeyValue,
    KVBlock,
    KVProjection,
    Memory,
    PositionalEncoding,
    QKNorm,
    State,
)
from lswt_core.model.plain_modules import is_plain_linear

TOGETHER = 64  # tokens from which on three projections are worth laying their weights side by side


class Attention(nn.Module):
    """Projections of one layer around its memories and the backend."""

    def __init__(
        self,
        dims: Dims,
        memories: Mapping[str, Memory],
        backend: AttentionBackend,
        query_norm: QKNorm | None = None,
        key_norm: QKNorm | None = None,
    ) -> None:
        super().__init__()
        self.n_heads = dims.n_heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(dims.d_model, dims.d_model, bias=dims.bias) for _ in range(4)
        )
        self.query_norm, self.key_norm = query_norm or nn.Identity(), key_norm or nn.Identity()
        require_one_keeper(memories)
        self.memory = nn.ModuleDict(memories)
        self.window = min(
            (memory.window for memory in memories.values() if memory.window), default=None
        )
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        state: Mapping[str, State],
        first_visible: Tensor | None,
        positional: PositionalEncoding,
    ) -> tuple[Tensor, dict[str, State]]:
        """Normed inputs x [B, T, M], positions [T], first_visible [B, T] or None -> [B, T, M] and
        every memory's next state.
        """
        x = rounded(x)  # once, not for every projection
        projected = Projections(self, x)
        segments, following = self.remember(x, positions, state, projected)
        parts = encode(
            self.query_norm(self.heads(projected.query())),
            segments,
            positions,
            self.within(positions, first_visible),
            positional,
        )
        return self.output(self.backend(parts).flatten(2)), following

    def remember(
        self, x: Tensor, positions: Tensor, state: Mapping[str, State], project: KVProjection
    ) -> tuple[list[KeyValue], dict[str, State]]:
        """Run the memories, the recipe's first outermost, around the key/value projection."""
        following: dict[str, State] = {}

        def through(name: str, memory: nn.Module, inner: KVProjection) -> KVProjection:
            def project(x: Tensor, positions: Tensor) -> list[KeyValue]:
                segments, following[name] = memory(x, positions, state.get(name), inner)
                return segments

            return project

        for name, memory in reversed(list(self.memory.items())):
            project = through(name, memory, project)
        return project(x, positions), following

    def within(self, positions: Tensor, first_visible: Tensor | None) -> Tensor | None:
        """Where what each query sees starts: its document, first_visible [B, T], or the layer's
        window, whichever is later.
        """
        if self.window is None:
            return first_visible
        first = (positions - self.window + 1)[None]  # [1, T]
        return first if first_visible is None else first_visible.maximum(first)

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, M] -> [B, N, H, D]."""
        return x.unflatten(-1, (self.n_heads, -1))


class Projections:
    """Queries, keys and values of a layer's inputs; keys and values of all that memories ask for."""

    def __init__(self, attention: Attention, x: Tensor) -> None:
        self.attention, self.x = attention, x
        self.found: Tensor | None = None  # queries [B, T, M], where they came along

    def __call__(self, x: Tensor, positions: Tensor) -> list[KeyValue]:
        """Keys and values of x [B, N, M]."""
        layer = self.attention
        three = (layer.query, layer.key, layer.value)
        if x is self.x and x.shape[:-1].numel() >= TOGETHER and all(map(is_plain_linear, three)):
            self.found, k, v = together(x, *three)  # faster than one by one
        else:
            k, v = layer.key(x), layer.value(x)
        return [KeyValue(layer.key_norm(layer.heads(k)), layer.heads(v), positions)]

    def query(self) -> Tensor:
        """Queries of the inputs."""
        return self.attention.query(self.x) if self.found is None else self.found


def together(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """What linear layers of one input [..., M] give, by one product."""
    weight = torch.cat([rounded(layer.weight) for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([rounded(layer.bias) for layer in layers])
    return nn.functional.linear(x, weight, bias).split(
        [layer.out_features for layer in layers], dim=-1
    )


def rounded(x: Tensor) -> Tensor:
    """To the precision that autocast multiplies in, as it would itself: float64 it leaves alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def require_one_keeper(memories: Mapping[str, Memory]) -> None:
    """Raise Incompatible if several memories of a layer keep tokens."""
    keeping = [
        f"memory.{name} ({memory.name})" for name, memory in memories.items() if memory.length
    ]
    if len(keeping) > 1:
        raise Incompatible(
            f"{' and '.join(keeping)} keep earlier tokens in the same layer, each of which would be"
            " attended to more than once; leave one, the others being removed by e.g."
            f" {keeping[0].split(' ')[0]} = false"
        )


def encode(
    q: Tensor,
    segments: list[KeyValue],
    positions: Tensor,
    first_visible: Tensor | None,
    positional: PositionalEncoding,
) -> list[KVBlock]:
    """Encode queries [B, T, H, D] and all keys for each other: sinks apart, and for everything that
    has a place the queries once. The last segment is the new tokens' own.
    """
    sinks = [segment for segment in segments if segment.positions is None]
    placed = [(segment, segment.positions) for segment in segments if segment.positions is not None]
    places = torch.cat([k_positions for _, k_positions in placed])
    # [], [1, T] or [B, T]
    oldest = places.amin() if first_visible is None else first_visible.clamp_min(places.amin())
    parts = [encode_sink(q, sink, positions, oldest, positional) for sink in sinks]
    q, keys = encode_placed(q, placed, positions, positional)
    for i, ((segment, k_positions), k) in enumerate(zip(placed, keys, strict=True)):
        bias = positional.bias(q, positions, k_positions)
        causal = i == len(placed) - 1 and len(positions) > 1  # a single query sees everything
        parts.append(
            KVBlock(
                q,
                k,
                segment.v,
                causal,
                bias=bias,
                positions=k_positions,
                first_visible=first_visible,
            )
        )
    return parts


def encode_placed(
    q: Tensor,
    segments: list[tuple[KeyValue, Tensor]],
    positions: Tensor,
    positional: PositionalEncoding,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Queries [B, T, H, D] and the keys of segments and their places, encoded for each other. Where
    an encoding only turns each by its own place, remembered keys are turned by themselves: nothing
    is copied together, and they stay without gradient.
    """
    if type(positional).encode is PositionalEncoding.encode:
        return positional.rotate(q, positions), [
            s.k if s.encoded else positional.rotate(s.k, k_positions) for s, k_positions in segments
        ]
    q, together = positional.encode(
        q,
        torch.cat([s.k for s, _ in segments], dim=1),
        positions,
        torch.cat([k_positions for _, k_positions in segments]),
    )
    return q, together.split([s.k.shape[1] for s, _ in segments], dim=1)


def encode_sink(
    q: Tensor, sink: KeyValue, positions: Tensor, oldest: Tensor, positional: PositionalEncoding
) -> KVBlock:
    """A sink's part: met by the queries [B, T, H, D] as the positional encoding has it, or by its
    own.
    """
    if sink.q is not None:
        return KVBlock(sink.q.expand(q.shape).contiguous(), sink.k, sink.v, causal=False)
    return KVBlock(*positional.encode_sink(q, sink.k, positions, oldest), sink.v, causal=False)


@contextmanager
def replaced_attention(
    model: nn.Module, substitute: Callable[[Attention], nn.Module]
) -> Iterator[None]:
    """While it lasts, every layer's backend is what ``substitute`` makes of the layer."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    backends = [layer.backend for layer in layers]
    for layer in layers:
        layer.backend = substitute(layer)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend
