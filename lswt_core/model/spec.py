"""The specification of a decoder: sizes, and one builder per component. ``build`` makes it from a
recipe; an exported model's own code makes it from its config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lswt_core.interfaces import Block, BlockParts, Dims, Head, MixerParts
from lswt_core.model.decoder import Decoder
from lswt_core.recipe.layer_selectors import tables_at

# Builds a component for the layer that ``Dims.layer`` numbers. Those of mixers and blocks take
# their parts as well.
Builder = Callable[..., Any]


def fill_components(
    options: Mapping[str, Any],
    inner: Mapping[str, tuple[str, int | None]],
    builder: Callable[[str, Any], Builder],
    arguments: Sequence[Any],
) -> dict[str, Any]:
    """A component's options with those that are components themselves as its constructor gets
    them. ``inner`` holds, by name of these, the kind, and with how many of the constructor's own
    positional ``arguments`` an instance is built (None: the constructor gets the builder).
    ``builder(kind, value)`` is the builder of what stands for one component in ``options``; several
    by name stand in a dict; None and False are none.
    """
    filled = dict(options)
    for name, (kind, count) in inner.items():

        def make(value: Any, kind: str = kind, count: int | None = count) -> Any:
            build = builder(kind, value)
            return build if count is None else build(*arguments[:count])

        value = filled.get(name)
        if value is None or value is False:
            filled[name] = None
        elif isinstance(value, Mapping) and not isinstance(value.get("use"), str):
            present = {part: one for part, one in sorted(value.items()) if one is not False}
            filled[name] = {part: make(one) for part, one in present.items()}
        else:
            filled[name] = make(value)
    return filled


class LayerSpec(NamedTuple):
    """The components of one block."""

    block: Builder
    mixer: Builder
    positional: Builder
    has_own_positional: bool  # False: the layer uses the decoder's
    memories: Mapping[str, Builder]  # by name, the outermost first
    attention: Builder
    qk_norm: Builder
    ffn: Builder
    norm: Builder

    def build(self, dims: Dims) -> Block:
        """Build the block on torch's default device."""
        block: Block = self.block(dims, self.block_parts())
        if self.has_own_positional:
            block.positional = self.positional(dims)
        return block

    def block_parts(self) -> BlockParts:
        """What the block is made of."""
        return BlockParts(self.norm, lambda dims: self.mixer(dims, self.mixer_parts()), self.ffn)

    def mixer_parts(self) -> MixerParts:
        """What the mixer is made of."""
        return MixerParts(self.memories, self.attention, self.qk_norm, self.positional)


class DecoderSpec(NamedTuple):
    """The sizes and components of a decoder."""

    dims: Dims
    trainable: bool  # the embedding table
    head: Builder
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
        dims = dims_from_tables(tables)

        def layer(number: int) -> LayerSpec:
            own = tables_at(tables, number)
            return LayerSpec(
                block=builder("block", own["block"]),
                mixer=builder("mixer", own["mixer"]),
                positional=builder("positional", own["positional"]),
                has_own_positional=own["positional"] != tables["positional"],
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
            trainable=tables["embedding"]["trainable"],
            head=builder("head", tables["head"]),
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
        vocabulary: Head = self.head(self.dims)
        if not self.trainable:
            vocabulary.freeze()
        input_norm, output_norm = self.norm(self.dims), self.norm(self.dims)
        return Decoder(vocabulary, self.positional(self.dims), input_norm, blocks, output_norm)


def dims_from_tables(tables: Mapping[str, Any]) -> Dims:
    """Read ``Dims`` from the tables of a resolved recipe."""
    model, embedding = tables["model"], tables["embedding"]
    d_model, n_heads = model["d_model"], model["n_heads"]
    return Dims(
        d_model=d_model,
        n_heads=n_heads,
        d_ffn=model.get("d_ffn") or 4 * d_model,
        n_layers=model["n_layers"],
        bias=model["bias"],
        queries_per_kv=n_heads // model.get("n_kv_heads", n_heads),
        vocab_size=embedding["vocab_size"],
        d_vocab=embedding["d_vocab"],
    )
