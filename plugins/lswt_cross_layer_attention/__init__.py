"""Cross-layer attention: several layers attend to the keys and values of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    Dims,
    KeyValue,
    KVBlock,
    KVProjection,
    LayerContext,
    MixerParts,
    State,
    Unsupported,
)
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention, within_window

SHARED = "cross-layer-attention"


class SharedKeyValues(NamedTuple):
    """What a layer hands up."""

    key_values: list[KeyValue]  # of tokens, in memory and new; no sinks
    window: int | None  # of that layer's memory


class CrossLayerAttention(SoftmaxAttention):
    """Softmax attention, to whose keys and values layers above may attend as well (CLA, Brandon et
    al. 2024, arXiv 2405.12981).

    ``keys`` "own": plain attention that hands its keys and values up. "below": the layer has no key
    and value projections; it attends to what the next layer below with ``keys`` "own" attends to,
    remembered tokens included. It keeps no tokens itself: remove the memory that does. Sinks belong
    to their layer, in both. The paper's CLA2, with half of the KV cache:

        [mixer]
        use = "cross-layer-attention"
        [layers."every 2".mixer]
        keys = "below"
        [layers."every 2".memory]
        xl = false

    Keys are handed up as projected and normed, and encoded by every layer's positional encoding.
    """

    name = "cross-layer-attention"
    citation = """@inproceedings{brandon2024reducing,
  title={Reducing Transformer Key-Value Cache Size with Cross-Layer Attention},
  author={Brandon, William and Mishra, Mayank and Nrusimha, Aniruddha and Panda, Rameswar and
    Ragan-Kelley, Jonathan},
  booktitle={NeurIPS}, year={2024}}"""

    def __init__(
        self, dims: Dims, parts: MixerParts, *, keys: Literal["own", "below"] = "own"
    ) -> None:
        super().__init__(dims, parts)
        self.is_reader = keys == "below"
        if not self.is_reader:
            self.writes = frozenset({SHARED})
            return
        self.reads = frozenset({SHARED})
        self.sees_past_of_others = True
        for unused in ("key", "value", "key_norm"):
            self.register_module(unused, None)
        for name, memory in self.memory.items():
            if memory.length:
                raise Unsupported(
                    f"memory.{name} ({memory.name}) of layer {dims.layer} keeps tokens, but with"
                    ' keys = "below" cross-layer-attention attends to those that the layer below'
                    f" keeps: set memory.{name} = false for this layer"
                )

    def key_values(
        self, x: Tensor, state: Mapping[str, State], context: LayerContext, project: KVProjection
    ) -> tuple[list[KeyValue], dict[str, State]]:
        """Its own keys and values, or those of the layer below, with sinks of its own."""
        if self.is_reader:
            project = partial(offer, context.carry[SHARED])
        return super().key_values(x, state, context, project)

    def encode(
        self, q: Tensor, key_values: Sequence[KeyValue], context: LayerContext
    ) -> list[KVBlock]:
        """Encode positions; a reader sees as far as the layer below."""
        if self.is_reader:
            first = within_window(context, context.carry[SHARED].window)
            context = context._replace(first_visible=first)
        return super().encode(q, key_values, context)

    def carry_up(self, key_values: Sequence[KeyValue]) -> Mapping[str, Any]:
        """The keys and values of tokens."""
        if self.is_reader:
            return {}
        tokens = [kv for kv in key_values if kv.positions is not None]
        return {SHARED: SharedKeyValues(tokens, self.window)}


def offer(shared: SharedKeyValues, x: Tensor, positions: Tensor) -> list[KeyValue]:
    """A projection of any inputs to what the layer below handed up."""
    return list(shared.key_values)


@hookimpl
def lswt_components() -> list[type]:
    """Offer cross-layer attention."""
    return [CrossLayerAttention]
