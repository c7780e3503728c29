"""Blocks with one mistake each."""

from __future__ import annotations

from torch import Tensor

from lswt_core.interfaces import Block, BlockParts, Dims, LayerContext, LayerOutput, State
from lswt_core.plugin_api.blocks import SublayerRunner
from mutants.expected import CITATION, caught_by


class Plain(Block):
    """A correct block, the base of mutants: pre-norm."""

    citation = CITATION

    def __init__(self, dims: Dims, parts: BlockParts) -> None:
        super().__init__(dims, parts)
        self.attention_norm, self.attention = parts.norm(dims), parts.mixer(dims)
        self.ffn_norm, self.ffn = parts.norm(dims), parts.ffn(dims)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]."""
        parts = SublayerRunner(state, context)
        x = x + parts.mix(self.attention, self.attention_norm(x))
        x = x + parts.feed_forward(self.ffn, self.ffn_norm(x))
        return parts.output(x)


@caught_by("row independence")
class BatchNorm(Plain, Block):
    """Normalises over the batch."""

    name = "batch-norm"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        deviation = (x.square().mean(0, keepdim=True) + 1e-3).sqrt()
        return super().forward(x / deviation, state, context)


@caught_by("in-place writes")
class AddsInPlace(Plain, Block):
    """Adds to its input in place."""

    name = "adds-in-place"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        parts = SublayerRunner(state, context)
        x += parts.mix(self.attention, self.attention_norm(x))
        x = x + parts.feed_forward(self.ffn, self.ffn_norm(x))
        return parts.output(x)


@caught_by("parts")
class DropsLosses(Plain, Block):
    """Does not return the loss terms of its parts."""

    name = "drops-losses"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        return super().forward(x, state, context)._replace(losses={})


@caught_by("parts")
class DropsCarry(Plain, Block):
    """Does not return what its parts hand up."""

    name = "drops-carry"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        return super().forward(x, state, context)._replace(carry={})


@caught_by("causality")
class SeesAhead(Plain, Block):
    """Adds the mean of all tokens."""

    name = "sees-ahead"

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        return super().forward(x + 0.1 * x.mean(1, keepdim=True), state, context)
