"""What a decoder is built from: sizes, and one builder a component. A recipe and an exported
model's config both end here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lswt_core.interfaces import Dims
from lswt_core.model.attention import Attention
from lswt_core.model.decoder import Block, Decoder
from lswt_core.model.embedding import TiedEmbedding
from lswt_core.recipe.layer_selectors import tables_at

Builder = Callable[[Dims], Any]  # a component of the model, for the layer that ``Dims.layer`` names


class Layer(NamedTuple):
    """What one block is built from."""

    positional: Builder | None  # None: the decoder's
    memories: Mapping[str, Builder]  # by name, the outermost first
    attention: Builder
    qk_norm: Builder
    ffn: Builder
    norm: Builder

    def build(self, dims: Dims) -> Block:
        """The block."""
        memories = {name: memory(dims) for name, memory in self.memories.items()}
        attention = Attention(
            dims, memories, self.attention(dims), self.qk_norm(dims), self.qk_norm(dims)
        )
        positional = None if self.positional is None else self.positional(dims)
        return Block(self.norm(dims), attention, self.norm(dims), self.ffn(dims), positional)


class Blueprint(NamedTuple):
    """A decoder not yet built."""

    dims: Dims
    vocab_size: int
    d_vocab: int
    trainable: bool  # the embedding table
    positional: Builder
    norm: Builder  # of the trunk's input and output
    layers: tuple[Layer, ...]

    @classmethod
    def from_tables(
        cls, tables: Mapping[str, Any], builder: Callable[[str, Mapping[str, Any]], Builder]
    ) -> Blueprint:
        """Read a resolved recipe's tables; ``builder(kind, table)`` builds the component of a kind
        that a table describes.
        """
        embedding, dims = tables["embedding"], dimensions(tables["model"])

        def layer(number: int) -> Layer:
            held = tables_at(tables, number)
            one = {
                kind: builder(kind, held[kind]) for kind in ("attention", "qk_norm", "ffn", "norm")
            }
            own = (
                None
                if held["positional"] == tables["positional"]
                else builder("positional", held["positional"])
            )
            return Layer(
                own,
                {name: builder("memory", table) for name, table in held.get("memory", {}).items()},
                **one,
            )

        return cls(
            dims=dims,
            vocab_size=embedding["vocab_size"],
            d_vocab=embedding["d_vocab"],
            trainable=embedding["trainable"],
            positional=builder("positional", tables["positional"]),
            norm=builder("norm", tables["norm"]),
            layers=tuple(layer(number) for number in range(dims.n_layers)),
        )

    def build(self) -> Decoder:
        """The decoder, on torch's default device."""
        blocks = [
            layer.build(self.dims._replace(layer=number))
            for number, layer in enumerate(self.layers)
        ]
        vocabulary = TiedEmbedding(self.vocab_size, self.d_vocab, self.dims.d_model)
        if not self.trainable:
            vocabulary.freeze()
        return Decoder(
            vocabulary,
            self.positional(self.dims),
            self.norm(self.dims),
            blocks,
            self.norm(self.dims),
        )


def dimensions(model: Mapping[str, Any]) -> Dims:
    """The sizes components are built for, from the table [model]."""
    width = model["d_model"]
    return Dims(
        width,
        model["n_heads"],
        model.get("d_ffn") or 4 * width,
        model["n_layers"],
        bias=model["bias"],
    )
