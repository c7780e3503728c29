"""For blocks: run mixers and feed-forward layers, and gather what they return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lswt_core.interfaces import (
    FeedForward,
    LayerContext,
    LayerOutput,
    LossSum,
    Mixer,
    State,
    StatefulFeedForward,
)

FFN_STATE = "ffn"  # the name of a feed-forward layer's state beside the mixer's


class SublayerRunner:
    """Runs the parts of a block in one forward pass: gives each its state and the context, and
    gathers next states, loss terms, and what they hand to other layers.

    The state of the layer is that of its mixer, and those of feed-forward layers by their names.
    """

    def __init__(self, state: State, context: LayerContext) -> None:
        self.state: Mapping[str, State] = state or {}
        self.context = context
        self.next_state: dict[str, State] = {}
        self.carry: dict[str, Any] = {}
        self.losses: dict[str, LossSum] = {}

    def mix(self, mixer: Mixer | nn.Module, x: Tensor) -> Tensor:
        """Run a mixer on normed inputs [B, T, M] -> [B, T, M]."""
        return self.gather(mixer(x, self.state or None, self.context))

    def feed_forward(
        self, ffn: FeedForward | nn.Module, x: Tensor, name: str = FFN_STATE
    ) -> Tensor:
        """Run a feed-forward layer on normed inputs [B, T, M] -> [B, T, M]. Several in one block
        need different names.
        """
        if not isinstance(ffn, StatefulFeedForward):
            output: Tensor = ffn(x)
            return output
        result = ffn(x, self.state.get(name), self.context)
        state = None if result.state is None else {name: result.state}
        return self.gather(result._replace(state=state))

    def gather(self, result: LayerOutput) -> Tensor:
        """Keep what a part returned; returns its output [B, T, M]."""
        for name, state in (result.state or {}).items():
            if name in self.next_state:
                raise ValueError(f"two parts of a layer keep a state called {name!r}")
            self.next_state[name] = state
        if result.carry:
            self.carry |= result.carry
            self.context = self.context._replace(carry={**self.context.carry, **result.carry})
        add_losses(self.losses, result.losses)
        return result.x

    def output(self, x: Tensor) -> LayerOutput:
        """What the block returns, with its residual stream x."""
        return LayerOutput(x, self.next_state, self.carry, self.losses)


def add_losses(total: dict[str, LossSum], losses: Mapping[str, LossSum]) -> None:
    """Add loss terms to those of the same name: totals and counts."""
    for name, term in losses.items():
        if name in total:
            before = total[name]
            term = LossSum(before.total + term.total, before.count + term.count)
        total[name] = term
