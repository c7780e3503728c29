"""The specification of a decoder: sizes, and one builder per component. ``build`` makes it from a
recipe; an exported model's own code makes it from its config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lswt_core.interfaces import Dims
from lswt_core.model.attention import Attention
from lswt_core.model.decoder import Block, Decoder
from lswt_core.model.embedding import TiedEmbedding
from lswt_core.recipe.layer_selectors import tables_at

Builder = Callable[[Dims], Any]  # builds a component for the layer that ``Dims.layer`` numbers


class LayerSpec(NamedTuple):
    """The components of one block."""

    positional: Builder | None  # None: the decoder's
    memories: Mapping[str, Builder]  # by name, the outermost first
    attention: Builder
    qk_norm: Builder
    ffn: Builder
    norm: Builder

    def build(self, dims: Dims) -> Block:
        """Build the block on torch's default device."""
        memories = {name: memory(dims) for name, memory in self.memories.items()}
        attention = Attention(
            dims, memories, self.attention(dims), self.qk_norm(dims), self.qk_norm(dims)
        )
        positional = None if self.positional is None else self.positional(dims)
        return Block(self.norm(dims), attention, self.norm(dims), self.ffn(dims), positional)


class DecoderSpec(NamedTuple):
    """The sizes and components of a decoder."""

    dims: Dims
    vocab_size: int
    d_vocab: int
    trainable: bool  # the embedding table
    positional: Builder
    norm: Builder  # the norms of the decoder's input and output
    layers: tuple[LayerSpec, ...]

    @classmethod
    def from_tables(
        cls, tables: Mapping[str, Any], builder: Callable[[str, Mapping[str, Any]], Builder]
    ) -> DecoderSpec:
        """Read the tables of a resolved recipe, as an exported model's config holds them;
        ``builder(kind, table)`` returns the builder of the component that a table describes.
        """
        embedding, dims = tables["embedding"], dims_from_table(tables["model"])

        def layer(number: int) -> LayerSpec:
            own = tables_at(tables, number)
            is_shared = own["positional"] == tables["positional"]
            return LayerSpec(
                positional=None if is_shared else builder("positional", own["positional"]),
                memories={
                    name: builder("memory", table) for name, table in own.get("memory", {}).items()
                },
                attention=builder("attention", own["attention"]),
                qk_norm=builder("qk_norm", own["qk_norm"]),
                ffn=builder("ffn", own["ffn"]),
                norm=builder("norm", own["norm"]),
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
        """Build the decoder on torch's default device."""
        blocks = [
            layer.build(self.dims._replace(layer=number))
            for number, layer in enumerate(self.layers)
        ]
        vocabulary = TiedEmbedding(self.vocab_size, self.d_vocab, self.dims.d_model)
        if not self.trainable:
            vocabulary.freeze()
        input_norm, output_norm = self.norm(self.dims), self.norm(self.dims)
        return Decoder(vocabulary, self.positional(self.dims), input_norm, blocks, output_norm)


def dims_from_table(model: Mapping[str, Any]) -> Dims:
    """Read ``Dims`` from the table [model] of a resolved recipe."""
    d_model = model["d_model"]
    d_ffn = model.get("d_ffn") or 4 * d_model
    return Dims(d_model, model["n_heads"], d_ffn, model["n_layers"], bias=model["bias"])
