"""Mixers with one mistake each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lswt_core.interfaces import (
    Dims,
    LayerContext,
    LayerOutput,
    Mixer,
    MixerParts,
    SoftCap,
    State,
)
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention
from mutants.expected import CITATION, caught_by


class Fading(Mixer):
    """A correct mixer, the base of mutants: a sum over earlier tokens that fades by half."""

    citation = CITATION
    reach = None

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        super().__init__(dims, parts)
        self.value = nn.Linear(dims.d_model, dims.d_model)
        self.output = nn.Linear(dims.d_model, dims.d_model)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]; the state is {"sum": [B, M]}."""
        values = self.value(x)
        total = torch.zeros_like(values[:, 0]) if state is None else state["sum"]
        sums = []
        for t in range(x.shape[1]):
            total = self.reset(total, t, context) * 0.5 + values[:, t]
            sums.append(total)
        return LayerOutput(self.output(torch.stack(sums, 1)), {"sum": total})

    def reset(self, total: Tensor, t: int, context: LayerContext) -> Tensor:
        """The sum before token t: zero where a document starts."""
        if context.first_visible is None:
            return total
        starts = context.first_visible[:, t] == context.positions[t]
        return total.masked_fill(starts[:, None], 0)


@caught_by("causality")
class LeaksAcrossSegments(Fading, Mixer):
    """Sees later tokens in every segment but the first."""

    name = "leaks-across-segments"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        later = 0 if state is None else x.mean(1, keepdim=True)
        return super().forward(x + later, state, context)


@caught_by("long sequences")
class LeaksBeyondHundred(Fading, Mixer):
    """Beyond 100 tokens, every token sees the next one."""

    name = "leaks-beyond-hundred"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        mixed = torch.cat((x[:, :100], x[:, 101:], x[:, 100:101]), 1)
        return super().forward(mixed, state, context)


@caught_by("stateless")
class KeepsSum(Fading, Mixer):
    """Keeps its sum on the module."""

    name = "keeps-sum"
    kept: Any = None

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        out = super().forward(x, None if state is None else self.kept, context)
        self.kept = out.state
        return out


@caught_by("stateless")
class CountsForwards(Fading, Mixer):
    """Counts its calls."""

    name = "counts-forwards"
    calls = 0

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        self.calls += 1
        return super().forward(x, state, context)


@caught_by("state")
class WidthFirst(Fading, Mixer):
    """The first dimension of its state is the width."""

    name = "width-first"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        before = None if state is None else {"sum": state["sum"].T}
        out = super().forward(x, before, context)
        return out._replace(state={"sum": out.state["sum"].T})


@caught_by("reach")
class RemembersMore(Fading, Mixer):
    """Its state depends on more tokens than it says."""

    name, reach = "remembers-more", 8


@caught_by("reach")
class UndeclaredState(Fading, Mixer):
    """Says that it has no state."""

    name, reach = "undeclared-state", 0


@caught_by("in-place writes")
class WritesOldState(Fading, Mixer):
    """Writes its next state into the old one."""

    name = "writes-old-state"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        out = super().forward(x, state, context)
        if state is None:
            return out
        return out._replace(state={"sum": state["sum"].detach().copy_(out.state["sum"])})


@caught_by("documents")
class ReadsAcrossDocuments(Fading, Mixer):
    """Does not start anew where a document does."""

    name = "reads-across-documents"

    def reset(self, total: Tensor, t: int, context: LayerContext) -> Tensor:
        return total


@caught_by("carry")
class ReadsUndeclared(Fading, Mixer):
    """Reads token ids without declaring it."""

    name = "reads-undeclared"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        even = context.carry["ids"] % 2 == 0
        return super().forward(x * (1 + even[..., None].to(x.dtype)), state, context)


@caught_by("carry")
class WritesUndeclared(Fading, Mixer):
    """Hands values up without declaring it."""

    name = "writes-undeclared"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        return super().forward(x, state, context)._replace(carry={"values": x})


@caught_by("carry")
class ReadsFirst(Fading, Mixer):
    """Every layer reads what a lower one writes, also the lowest."""

    name, reads, writes = "reads-first", frozenset({"values"}), frozenset({"values"})

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        out = super().forward(x + context.carry["values"], state, context)
        return out._replace(carry={"values": x})


class Handing(Fading, Mixer):
    """A correct mixer, the base of mutants: adds the values of the first layer to its inputs."""

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        super().__init__(dims, parts)
        entry = frozenset({"first"})
        self.is_first = dims.layer == 0
        self.reads, self.writes = (frozenset(), entry) if self.is_first else (entry, frozenset())

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        if self.is_first:
            return super().forward(x, state, context)._replace(carry={"first": self.write(x)})
        return super().forward(x + self.read(context.carry["first"]), state, context)

    def write(self, x: Tensor) -> Tensor:
        return self.value(x)

    def read(self, first: Tensor) -> Tensor:
        return first


@caught_by("carry gradients")
class DetachesWhatItWrites(Handing, Mixer):
    """Hands its values up without their gradient."""

    name = "detaches-what-it-writes"

    def write(self, x: Tensor) -> Tensor:
        return self.value(x).detach()


@caught_by("carry gradients")
class DetachesWhatItReads(Handing, Mixer):
    """Takes what is handed up as constants."""

    name = "detaches-what-it-reads"

    def read(self, first: Tensor) -> Tensor:
        return first.detach()


@caught_by("parts")
class NamesMemory(Fading, Mixer):
    """Says that it uses memories and never calls one."""

    name, uses = "names-memory", frozenset({"memory"})


@caught_by("reach")
class GrowsForever(SoftmaxAttention, Mixer):
    """Keeps every token beside its memories' state."""

    name, citation = "grows-forever", CITATION

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        before = () if state is None else (state["all"],)
        out = super().forward(x, state, context)
        return out._replace(state={**out.state, "all": torch.cat((*before, x), 1).detach()})


@caught_by("declared scores")
class CapsUndeclared(SoftmaxAttention, Mixer):
    """Caps its scores without declaring it."""

    name, citation = "caps-undeclared", CITATION

    def __init__(self, dims: Dims, parts: MixerParts) -> None:
        super().__init__(dims, parts)
        self.transform = SoftCap(20.0)
