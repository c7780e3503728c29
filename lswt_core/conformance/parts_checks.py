"""Checks of what mixers and blocks do with their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, Subject
from lswt_core.conformance.tensors import random_normal
from lswt_core.interfaces import (
    AttentionBackend,
    BlockParts,
    Dims,
    KVBlock,
    LayerContext,
    LayerOutput,
    LossSum,
    Mixer,
    MixerParts,
    State,
    StatefulFeedForward,
    Unsupported,
)
from lswt_core.model.compatibility import PARTS
from lswt_core.model.initialise import initialise

ENCODING_METHODS = ("rotate", "encode", "encode_sink", "bias", "block_biases", "features")


class CalledParts:
    """Builders of a mixer's parts that note which parts are called."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.called = set[str]()

    def builder(self, kind: str) -> Callable[[Dims], Any]:
        """A builder of the reference part of a kind."""

        def build(dims: Dims) -> Any:
            part: nn.Module = self.subject.reference(kind)(dims)
            part.register_forward_hook(lambda *_: self.called.add(kind))
            return self.watch_encoding(part) if kind == "positional" else part

        return build

    def watch_encoding(self, encoding: Any) -> Any:
        """A positional encoding that notes its use."""

        def note(method: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any) -> Any:
                self.called.add("positional")
                return method(*args)

            return noted

        for name in ENCODING_METHODS:
            if hasattr(encoding, name):
                setattr(encoding, name, note(getattr(encoding, name)))
        return encoding

    def mixer_parts(self) -> MixerParts:
        """All parts, with one memory."""
        memories = {"xl": self.builder("memory")}
        return MixerParts(memories, *map(self.builder, ("attention", "qk_norm", "positional")))


@rule(
    "parts",
    ("mixer",),
    why="a recipe that names a part is refused, or believed, by what `uses` says",
    fix="name in `uses` the parts that are called in forward, and no others",
    after=("forward",),
)
@torch.no_grad()
def uses_what_it_says(subject: Subject) -> None:
    """The parts in ``uses`` are called. A recipe cannot name others: these may be built, too."""
    uses = frozenset(subject.component.uses)  # type: ignore[attr-defined]
    unknown = sorted(uses - set(PARTS))
    require(not unknown, f"`uses` has {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    parts = CalledParts(subject)
    mix_two_segments(subject, parts, parts.mixer_parts())
    unused = sorted(uses - parts.called)
    require(not unused, f"`uses` has {', '.join(unused)}, which forward never calls")


def mix_two_segments(subject: Subject, parts: CalledParts, given: MixerParts) -> None:
    """Run the mixer, built with these parts, on two segments. Raises SkipTest if it reads what
    other layers write.
    """
    if "memory" not in subject.component.uses:  # type: ignore[attr-defined]
        given = given._replace(memories={})
    mixer: Mixer = subject.build(DIMS, given).double()
    if mixer.reads:
        raise SkipTest("it reads what other layers write")
    initialise(mixer, seed=0, std=0.4)
    context = LayerContext(torch.arange(4), None, parts.builder("positional")(DIMS).double(), {})
    x = random_normal(1, 4, DIMS.d_model)
    mixer(x, mixer(x, None, context).state, context)


@rule(
    "declared scores",
    ("mixer",),
    why=(
        "the attention backend is chosen by what a mixer declares: one that cannot do what its"
        " blocks carry fails in the run"
    ),
    fix="set transforms_scores, selects_keys or has_bias on the class",
    after=("parts",),
)
@torch.no_grad()
def declares_what_blocks_carry(subject: Subject) -> None:
    """Transforms, selections and biases of its key blocks are declared."""
    component: Any = subject.component
    parts, seen = CalledParts(subject), list[KVBlock]()

    def attention(dims: Dims) -> AttentionBackend:
        backend: AttentionBackend = subject.reference("attention")(dims)
        backend.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[0]))
        return backend

    mix_two_segments(subject, parts, parts.mixer_parts()._replace(attention=attention))
    allowed = component.transforms_scores or ()
    for block in seen:
        transform = block.transform
        declared = transform is None or isinstance(transform, allowed)
        require(declared, f"transforms scores by {type(transform).__name__}, and declares none")
        selects = block.selected is not None
        require(component.selects_keys or not selects, "selects keys, and does not declare it")
        require(component.has_bias or block.bias is None, "biases scores, and does not declare it")


class Probe(StatefulFeedForward):
    """A feed-forward layer that returns all that a layer can."""

    name = "probe"
    reach = 1
    writes = frozenset({"probe"})
    loss_weights = {"probe": 1.0}  # noqa: RUF012
    calls = 0

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State, context: LayerContext
    ) -> LayerOutput:
        """The input, its last token as state, itself as carry, and a loss of 1."""
        Probe.calls += 1
        one = x.new_ones(())
        return LayerOutput(x, {"last": x[:, -1:]}, {"probe": x}, {"probe": LossSum(one, one)})


@rule(
    "parts",
    ("block",),
    why=(
        "what a part keeps, hands up or is trained by is lost without a word if the block does not"
        " return it"
    ),
    fix="run parts by lswt_core.plugin_api.blocks.SublayerRunner, and return its output(x)",
    after=("forward",),
)
@torch.no_grad()
def hands_on_what_parts_return(subject: Subject) -> None:
    """State, carry and losses of the parts are in the block's output, unless it refuses them."""
    layer = subject.layer_spec(DIMS)
    parts: BlockParts = layer.block_parts()._replace(ffn=Probe)
    try:
        block: Any = subject.build(DIMS, parts).double()
    except Unsupported as reason:
        raise SkipTest(f"it refuses such parts: {reason}") from reason
    initialise(block, seed=0, std=0.4)
    context = LayerContext(torch.arange(4), None, layer.positional(DIMS).double(), {})
    before = Probe.calls
    out: LayerOutput = block(block.open_stream(random_normal(2, 4, DIMS.d_model)), None, context)
    if Probe.calls == before:
        raise SkipTest("it has no feed-forward layer")
    state = out.state or {}
    kept = any("last" in value for value in state.values() if isinstance(value, dict))
    require("xl" in state, "the state of the mixer is not in the block's output")
    require(kept, "the state of the feed-forward layer is not in the block's output")
    require("probe" in out.carry, "what a part writes (carry) is not in the block's output")
    require("probe" in out.losses, "the loss terms of a part are not in the block's output")
