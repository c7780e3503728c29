"""What a decoder is built from: sizes, and one builder a component. A recipe and an exported model's config both end here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lswt_core.head import Vocabulary
from lswt_core.interfaces import Dims
from lswt_core.model import Attention, Block, Decoder

Builder = Callable[[Dims], Any]  # a component of the model, for the layer that ``Dims.layer`` names


class Blueprint(NamedTuple):
    """A decoder not yet built."""

    dims: Dims
    vocab_size: int
    d_vocab: int
    trainable: bool  # the embedding table
    positional: Builder
    memories: Mapping[str, Builder]  # by name, the outermost first
    attention: Builder
    qk_norm: Builder
    ffn: Builder
    norm: Builder

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], builder: Callable[[str, str], Builder]) -> Blueprint:
        """Read a resolved recipe's tables; ``builder(kind, name)`` builds the component of a kind, of a memory by its name."""
        embedding = tables["embedding"]
        one = {kind: builder(kind, kind) for kind in ("positional", "attention", "qk_norm", "ffn", "norm")}
        memories = {name: builder("memory", name) for name in tables.get("memory", {})}
        return cls(
            dims=dimensions(tables["model"]),
            vocab_size=embedding["vocab_size"],
            d_vocab=embedding["d_vocab"],
            trainable=embedding["trainable"],
            memories=memories,
            **one,
        )

    def build(self) -> Decoder:
        """The decoder, on torch's default device."""
        blocks = [self.block(self.dims._replace(layer=layer)) for layer in range(self.dims.n_layers)]
        vocabulary = Vocabulary(self.vocab_size, self.d_vocab, self.dims.d_model)
        if not self.trainable:
            vocabulary.freeze()
        return Decoder(vocabulary, self.positional(self.dims), self.norm(self.dims), blocks, self.norm(self.dims))

    def block(self, dims: Dims) -> Block:
        """One layer."""
        memories = {name: memory(dims) for name, memory in self.memories.items()}
        attention = Attention(dims, memories, self.attention(dims), self.qk_norm(dims), self.qk_norm(dims))
        return Block(self.norm(dims), attention, self.norm(dims), self.ffn(dims))


def dimensions(model: Mapping[str, Any]) -> Dims:
    """The sizes components are built for, from the table [model]."""
    width = model["d_model"]
    return Dims(width, model["n_heads"], model.get("d_ffn") or 4 * width, model["n_layers"], bias=model["bias"])
