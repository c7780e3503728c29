"""The decoder: how components are wired, and no component.

Pre-norm blocks after an input norm, x + attention(norm(x)) then x + ffn(norm(x)), and an output norm. Attention is one softmax
over the union of parts (sinks, remembered tokens, the new segment), each offered by a memory and encoded by the positional
encoding; a backend computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lswt_core.errors import Incompatible, PluginError
from lswt_core.head import Vocabulary
from lswt_core.interfaces import (
    AttentionBackend,
    Dims,
    FeedForward,
    HeadNorm,
    Memory,
    Norm,
    Part,
    PositionalEncoding,
    Project,
    Segment,
    State,
)
from lswt_core.plain import is_plain_linear
from lswt_core.randomness import derive

TOGETHER = 64  # tokens from which on three projections are worth laying their weights side by side


class Attention(nn.Module):
    """Projections of one layer around its memories and the backend."""

    def __init__(
        self,
        dims: Dims,
        memories: Mapping[str, Memory],
        backend: AttentionBackend,
        query_norm: HeadNorm | None = None,
        key_norm: HeadNorm | None = None,
    ) -> None:
        super().__init__()
        self.n_heads = dims.n_heads
        self.query, self.key, self.value, self.output = (nn.Linear(dims.d_model, dims.d_model, bias=dims.bias) for _ in range(4))
        self.query_norm, self.key_norm = query_norm or nn.Identity(), key_norm or nn.Identity()
        require_one_keeper(memories)
        self.memory = nn.ModuleDict(memories)
        self.window = min((memory.window for memory in memories.values() if memory.window), default=None)
        self.backend = backend

    def forward(
        self, x: Tensor, at: Tensor, state: Mapping[str, State], starts: Tensor | None, positional: PositionalEncoding
    ) -> tuple[Tensor, dict[str, State]]:
        """Normed inputs x [B, T, M], at [T], starts [B, T] or None -> [B, T, M] and every memory's next state."""
        x = rounded(x)  # once, not for every projection
        projected = Projections(self, x)
        segments, following = self.remember(x, at, state, projected)
        parts = encode(self.query_norm(self.heads(projected.query())), segments, at, self.within(at, starts), positional)
        return self.output(self.backend(parts).flatten(2)), following

    def remember(self, x: Tensor, at: Tensor, state: Mapping[str, State], project: Project) -> tuple[list[Segment], dict[str, State]]:
        """Run the memories, the recipe's first outermost, around the key/value projection."""
        following: dict[str, State] = {}

        def through(name: str, memory: nn.Module, inner: Project) -> Project:
            def project(x: Tensor, at: Tensor) -> list[Segment]:
                segments, following[name] = memory(x, at, state.get(name), inner)
                return segments

            return project

        for name, memory in reversed(list(self.memory.items())):
            project = through(name, memory, project)
        return project(x, at), following

    def within(self, at: Tensor, starts: Tensor | None) -> Tensor | None:
        """Where what each query sees starts: its document, starts [B, T], or the layer's window, whichever is later."""
        if self.window is None:
            return starts
        first = (at - self.window + 1)[None]  # [1, T]
        return first if starts is None else starts.maximum(first)

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, M] -> [B, N, H, D]."""
        return x.unflatten(-1, (self.n_heads, -1))


class Projections:
    """Queries, keys and values of a layer's inputs; keys and values of all that memories ask for."""

    def __init__(self, attention: Attention, x: Tensor) -> None:
        self.attention, self.x = attention, x
        self.found: Tensor | None = None  # queries [B, T, M], where they came along

    def __call__(self, x: Tensor, at: Tensor) -> list[Segment]:
        """Keys and values of x [B, N, M]."""
        layer = self.attention
        three = (layer.query, layer.key, layer.value)
        if x is self.x and x.shape[:-1].numel() >= TOGETHER and all(map(is_plain_linear, three)):
            self.found, k, v = together(x, *three)  # faster than one by one
        else:
            k, v = layer.key(x), layer.value(x)
        return [Segment(layer.key_norm(layer.heads(k)), layer.heads(v), at)]

    def query(self) -> Tensor:
        """Queries of the inputs."""
        return self.attention.query(self.x) if self.found is None else self.found


def together(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """What linear layers of one input [..., M] give, by one product."""
    weight = torch.cat([rounded(layer.weight) for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([rounded(layer.bias) for layer in layers])
    return nn.functional.linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)


def rounded(x: Tensor) -> Tensor:
    """To the precision that autocast multiplies in, as it would itself: float64 it leaves alone."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def require_one_keeper(memories: Mapping[str, Memory]) -> None:
    """Raise Incompatible if several memories of a layer keep tokens."""
    keeping = [f"memory.{name} ({memory.name})" for name, memory in memories.items() if memory.length]
    if len(keeping) > 1:
        raise Incompatible(
            f"{' and '.join(keeping)} keep earlier tokens in the same layer, each of which would be attended to more than once; "
            f"leave one, the others being removed by e.g. {keeping[0].split(' ')[0]} = false"
        )


def encode(q: Tensor, segments: list[Segment], at: Tensor, starts: Tensor | None, positional: PositionalEncoding) -> list[Part]:
    """Encode queries [B, T, H, D] and all keys for each other: sinks apart, and for everything that has a place the queries once. The
    last segment is the new tokens' own.
    """
    sinks = [segment for segment in segments if segment.at is None]
    placed = [(segment, segment.at) for segment in segments if segment.at is not None]
    places = torch.cat([k_at for _, k_at in placed])
    oldest = places.amin() if starts is None else starts.clamp_min(places.amin())  # [], [1, T] or [B, T]
    parts = [encode_sink(q, sink, at, oldest, positional) for sink in sinks]
    q, keys = encode_placed(q, placed, at, positional)
    for i, ((segment, k_at), k) in enumerate(zip(placed, keys, strict=True)):
        bias = positional.bias(q, at, k_at)
        causal = i == len(placed) - 1 and len(at) > 1  # a single query sees everything
        parts.append(Part(q, k, segment.v, causal, bias=bias, at=k_at, starts=starts))
    return parts


def encode_placed(
    q: Tensor, segments: list[tuple[Segment, Tensor]], at: Tensor, positional: PositionalEncoding
) -> tuple[Tensor, Sequence[Tensor]]:
    """Queries [B, T, H, D] and the keys of segments and their places, encoded for each other. Where an encoding only turns each by its
    own place, remembered keys are turned by themselves: nothing is copied together, and they stay without gradient.
    """
    if type(positional).encode is PositionalEncoding.encode:
        return positional.rotate(q, at), [s.k if s.encoded else positional.rotate(s.k, k_at) for s, k_at in segments]
    q, together = positional.encode(q, torch.cat([s.k for s, _ in segments], dim=1), at, torch.cat([k_at for _, k_at in segments]))
    return q, together.split([s.k.shape[1] for s, _ in segments], dim=1)


def encode_sink(q: Tensor, sink: Segment, at: Tensor, oldest: Tensor, positional: PositionalEncoding) -> Part:
    """A sink's part: met by the queries [B, T, H, D] as the positional encoding has it, or by its own."""
    if sink.q is not None:
        return Part(sink.q.expand(q.shape).contiguous(), sink.k, sink.v, causal=False)
    return Part(*positional.encode_sink(q, sink.k, at, oldest), sink.v, causal=False)


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added after."""

    def __init__(
        self, attention_norm: Norm, attention: Attention, ffn_norm: Norm, ffn: FeedForward, positional: PositionalEncoding | None = None
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.positional = positional  # of this layer alone, in place of the decoder's

    def forward(
        self, x: Tensor, at: Tensor, state: Mapping[str, State], starts: Tensor | None, positional: PositionalEncoding
    ) -> tuple[Tensor, dict[str, State]]:
        """[B, T, M] -> [B, T, M] and the layer's next memory states."""
        own = positional if self.positional is None else self.positional
        attended, following = self.attention(self.attention_norm(x), at, state, starts, own)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), following


class Decoder(nn.Module):
    """The language model: ids to final states; its vocabulary turns states into logits or a loss."""

    def __init__(
        self, vocabulary: Vocabulary, positional: PositionalEncoding, input_norm: Norm, blocks: list[Block], output_norm: Norm
    ) -> None:
        super().__init__()
        self.vocabulary, self.positional = vocabulary, positional
        self.input_norm = input_norm
        self.blocks = nn.ModuleList(blocks)
        self.output_norm = output_norm
        self.activation_checkpointing = False  # keep a block's input alone for the backward pass, and run the block again there

    def forward(
        self, inputs: Tensor, state: tuple[Mapping[str, State], ...] | None = None, starts: Tensor | None = None, first: int | Tensor = 0
    ) -> tuple[Tensor, tuple[dict[str, State], ...]]:
        """Ids [B, T] and the last call's memory (None when cold) -> normed states [B, T, M] and the next memory, by layer. ``first`` is
        the coordinate of the first id, 0 unless memories number tokens from somewhere else; a tensor [] where the device alone knows.
        """
        return self.trunk(self.vocabulary.embed(inputs), state, starts, first)

    def trunk(
        self,
        x: Tensor,
        state: tuple[Mapping[str, State], ...] | None = None,
        starts: Tensor | None = None,
        first: int | Tensor = 0,
        visit: Callable[[Tensor], None] = lambda x: None,
    ) -> tuple[Tensor, tuple[dict[str, State], ...]]:
        """The same from embedded inputs x [B, T, M]. ``visit`` is shown every hidden state [B, T, M]: the input norm's, every
        block's and the output norm's.
        """
        at = torch.arange(x.shape[1], device=x.device) + first
        x = self.input_norm(self.positional.embed(x, at))
        visit(x)
        following = []
        for i, block in enumerate(self.blocks):
            given = (x, at, state[i] if state else {}, starts, self.positional)
            again = self.activation_checkpointing and torch.is_grad_enabled()
            x, kept = checkpoint(block, *given, use_reentrant=False) if again else block(*given)
            visit(x)
            following.append(kept)
        x = self.output_norm(x)
        visit(x)
        return x, tuple(following)

    @property
    def reach(self) -> int:
        """How many tokens back the longest of its memories reaches; 0: nothing is kept from one call to the next."""
        memories = [module for module in self.modules() if isinstance(module, Memory)]
        return max((memory.length for memory in memories), default=0)


@contextmanager
def replaced_attention(model: nn.Module, substitute: Callable[[Attention], nn.Module]) -> Iterator[None]:
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


def initialise(model: nn.Module, *, seed: int, std: float) -> None:
    """Give every parameter its initial value from a random stream of its own, derived from the seed and its name: adding a
    component moves no other parameter, so that arms of an ablation start equal.

    Linear and Embedding weights are N(0, std^2), biases 0 (Radford et al. 2019). Any other module,
    and a subclass of these with a ``reset_parameters`` of its own, draws there, torch's convention.
    Children come before their parents, so that what a module says there about its children stands.
    """
    for name, module in bottom_up(model):
        if starts_by_default(module):
            for key, parameter in module.named_parameters(recurse=False):
                nn.init.zeros_(parameter) if key == "bias" else normal(parameter, std, derive(seed, "init", f"{name}.{key}"))
        else:
            reset(module, name, derive(seed, "init", name))


def bottom_up(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by the name ``named_modules`` gives it, children before their parents."""
    names = {module: name for name, module in model.named_modules()}
    seen: set[nn.Module] = set()

    def walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module not in seen:
            seen.add(module)
            for child in module.children():
                yield from walk(child)
            yield names[module], module

    return walk(model)


def starts_by_default(module: nn.Module) -> bool:
    """Whether a module starts as Linear and Embedding do: it is one, without a ``reset_parameters``."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return False
    return type(module).reset_parameters in (nn.Linear.reset_parameters, nn.Embedding.reset_parameters)


def normal(parameter: nn.Parameter, std: float, seed: int) -> None:
    """Fill a parameter from its own stream, drawn on the CPU in float32 so that every device and precision starts equal."""
    drawn = torch.empty(parameter.shape).normal_(std=std, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        parameter.copy_(drawn)


def reset(module: nn.Module, name: str, seed: int) -> None:
    """Let a module draw its own parameters, and change its children's, from its own stream.

    One that owns nothing may leave its children as they are.
    """
    draw: Callable[[], None] | None = getattr(module, "reset_parameters", None)
    if draw is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            draw()
    elif any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        raise PluginError(
            f"{type(module).__name__} at {name!r} owns parameters or buffers but does not say how they start: "
            "give it a method reset_parameters(self) that fills them (models are built without memory first)"
        )
