"""Checks of one forward pass: what a layer reads and writes, and that nothing it was given
changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.conformance.check import Violation, require, rule
from lswt_core.conformance.subject import LAYER_KINDS, MODEL_KINDS, Subject
from lswt_core.conformance.tensors import decode_segments, random_tokens, tensors_in
from lswt_core.errors import Incompatible
from lswt_core.interfaces import Layer, LayerContext, LayerOutput, PositionalEncoding
from lswt_core.model.compatibility import check_carry
from lswt_core.model.decoder import EMBEDDINGS, IDS, Decoder


class WatchedCarry(dict[str, Any]):
    """A carry that notes which entries are read by name. ``{**carry}``, which blocks pass on to
    their parts, is not noted.
    """

    def __init__(self, entries: dict[str, Any], read: set[str]) -> None:
        super().__init__(entries)
        self.read = read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The entry, or a default."""
        self.read.add(key)
        return super().get(key, default)


@contextmanager
def watch_carry(layer: nn.Module, decoder: Decoder, ids: Tensor, read: set[str]) -> Iterator[None]:
    """Give a layer a carry that has all that the decoder may offer, and notes what is read."""

    def replace(value: Any) -> Any:
        if not isinstance(value, LayerContext):
            return value
        offered = {IDS: ids, EMBEDDINGS: decoder.vocabulary.embed(ids)}
        return value._replace(carry=WatchedCarry(offered | {**value.carry}, read))

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        replaced = {name: replace(value) for name, value in kwargs.items()}
        return tuple(map(replace, args)), replaced

    handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@rule(
    "carry",
    LAYER_KINDS,
    why=(
        "a layer gets only what it declares, and a model whose layers do not fit together is"
        " refused before it is built"
    ),
    fix=(
        "name in `reads` what forward takes out of context.carry, and in `writes` what it returns"
        " in LayerOutput.carry; set them on the instance where layers differ"
    ),
    after=("meta device",),
)
def carry_is_declared(subject: Subject) -> None:
    """Layers read and write exactly what they declare, and nothing that no layer below wrote."""
    decoder, ids = subject.decoder(), random_tokens(2, 4)
    try:
        check_carry(decoder)
    except Incompatible as error:
        raise Violation(str(error)) from error
    for layer in subject.own_modules(decoder):
        assert isinstance(layer, Layer)
        read, outputs = set[str](), list[LayerOutput]()
        handle = layer.register_forward_hook(lambda _, args, out, kept=outputs: kept.append(out))
        with watch_carry(layer, decoder, ids, read):
            run_quietly(decoder, ids)
        handle.remove()
        undeclared = sorted(read - layer.reads)
        require(not undeclared, f"forward reads {', '.join(undeclared)}, which `reads` lacks")
        for out in outputs:
            require_writes(layer, out)


def run_quietly(decoder: Decoder, ids: Tensor) -> None:
    """A forward pass whose errors are left to the check "forward"."""
    try:
        decoder(ids)
    except Exception:
        return


def require_writes(layer: Layer, out: Any) -> None:
    """Require a layer's output to hold what the layer, and its parts, declare."""
    if not isinstance(out, LayerOutput):
        return
    allowed = set[str]().union(*(m.writes for m in layer.modules() if isinstance(m, Layer)))
    undeclared = sorted(out.carry.keys() - allowed)
    require(not undeclared, f"forward returns {', '.join(undeclared)}, which `writes` lacks")
    missing = sorted(layer.writes - out.carry.keys())
    require(not missing, f"`writes` has {', '.join(missing)}, which forward does not return")


@rule(
    "forward",
    MODEL_KINDS,
    why="this is what every training step does",
    fix="let forward take and return what the interface says, of the shapes it says",
    after=("meta device", "carry"),
)
def runs_forward(subject: Subject) -> None:
    """Two segments of a text, the second with the state of the first, run without an error."""
    decode_segments(subject.decoder(), random_tokens(2, 8), 4)


@rule(
    "in-place writes",
    MODEL_KINDS,
    why=(
        "others still hold the tensors: a block adds the input to the output, and a step that is"
        " taken back starts again from the old state"
    ),
    fix="write into no tensor that forward was given: x + 1, not x.add_(1) or x[:, 0] = 1",
    after=("forward",),
)
@torch.no_grad()
def inputs_stay(subject: Subject) -> None:
    """A forward pass changes neither its inputs nor the state that it is given."""
    decoder, ids = subject.decoder(), random_tokens(2, 8)
    for module in subject.own_modules(decoder):
        guard_inputs(module)
    _, state = decoder(ids[:, :4])
    before = [tensor.clone() for tensor in tensors_in(state)]
    decoder(ids[:, 4:], state)
    for old, tensor in zip(before, tensors_in(state), strict=True):
        require(torch.equal(old, tensor), "a call writes into the state that it was given")
    if isinstance(decoder.positional, PositionalEncoding) and subject.kind == "positional":
        require_pure_encoding(decoder.positional)


def guard_inputs(module: nn.Module) -> None:
    """Let every call of a module compare its inputs with what they were before."""
    copies: list[list[tuple[Tensor, Tensor]]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        copies.append([(tensor, tensor.clone()) for tensor in tensors_in([args, kwargs])])

    def after(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        for tensor, copy in copies.pop():
            require(
                torch.equal(tensor, copy),
                f"forward writes into a tensor {list(tensor.shape)} that it was given",
            )

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)


def require_pure_encoding(encoding: PositionalEncoding) -> None:
    """Require the methods of a positional encoding, which are no ``forward``, to leave inputs."""
    x, q = torch.ones(1, 3, 16), torch.ones(1, 3, 2, 8)
    dtype = torch.float64
    x, q, positions = x.to(dtype), q.to(dtype), torch.arange(3)
    encoding.embed(x, positions)
    encoding.encode(q, q.clone(), positions, positions)
    require((x == 1).all() and (q == 1).all(), "embed, rotate or encode write into their inputs")
