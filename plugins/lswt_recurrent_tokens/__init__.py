"""Recurrent memory tokens: the model writes a few vectors at the end of each chunk of tokens, and
reads them in the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    Block,
    BlockParts,
    Dims,
    Layer,
    LayerContext,
    LayerOutput,
    Mixer,
    State,
    Unsupported,
)
from lswt_core.plugin_api.blocks import SublayerRunner
from lswt_core.plugin_api.recurrence import first_seen
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention


class MemoryLayer(nn.Module):
    """One layer that memory tokens and text pass, wired like the pre-norm block."""

    def __init__(self, dims: Dims, parts: BlockParts) -> None:
        super().__init__()
        self.attention_norm, self.attention = parts.norm(dims), parts.mixer(dims)
        self.ffn_norm, self.ffn = parts.norm(dims), parts.ffn(dims)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]."""
        parts = SublayerRunner(state, context)
        x = x + parts.mix(self.attention, self.attention_norm(x))
        x = x + parts.feed_forward(self.ffn, self.ffn_norm(x))
        return parts.output(x)


class Reading(NamedTuple):
    """How far a text is read: the state of the block."""

    memory: Tensor  # [B, m, M], what the last chunk wrote; [B, 0, M] in the first chunk
    text: Tensor  # [B, n, M], the block's inputs of the incomplete chunk
    layers: tuple[State, ...] = ()  # of the incomplete chunk; () at its beginning


class RecurrentTokens(Block):
    """The Recurrent Memory Transformer (Bulatov et al. 2022, arXiv 2207.06881): ``tokens`` memory
    tokens stand before and after each chunk of ``chunk`` tokens.

    ``[_, Y_c, Z_c] = layers([S_{c-1}, X_c, S_{c-1} + W])`` and ``S_c = norm(Z_c)``: the first copy
    of the memory is read by the chunk, the last one sees all of it, and what becomes of it is read
    in the next chunk. ``layers`` is the ``depth`` pre-norm layers of this block. The paper's model
    is a single block of all layers: ``model.n_layers`` = 1 and ``depth`` the number of layers;
    memory then comes from the top and is read at the bottom. Several blocks have memories of their
    own, each recurrent over its own layers (``depth`` = 1: over every layer, as in Sivtsov et al.
    2025, arXiv 2506.05229). Layer selectors and activation checkpointing know blocks alone.

    Differences from the paper: W is learned and added in every chunk, where the paper learns S_0
    alone, of which a stream that goes on would teach it nothing after its first step. In the first
    chunk of a text there is nothing to read, and W is what is written; so in AutoCompressors
    (Chevalier et al. 2023, arXiv 2305.14788). The norm keeps S as large as an embedding, as
    post-norm layers do. All tokens are causal, where the authors' code lets memory tokens see all
    of their own group. They have the positions where they stand. No keys are kept from chunk to
    chunk, as in the paper without cache.

    Chunks are counted from the beginning of the row and not from that of the training segment, so
    that a text gives the same in whatever pieces it is read. What the layers keep of an incomplete
    chunk (memory.xl) must be long enough for that; without any, its tokens are read again at every
    call. Within a segment, later chunks give a gradient to what earlier ones wrote:
    ``train.seq_len`` should be several chunks. Documents read and write no memory of others, but
    share the row's chunks: one that begins within a chunk has no memory in it.
    """

    name = "recurrent-tokens"
    reach = None
    no_weight_decay = ("write",)
    citation = """@inproceedings{bulatov2022recurrent,
  title={Recurrent Memory Transformer},
  author={Bulatov, Aydar and Kuratov, Yuri and Burtsev, Mikhail S},
  booktitle={NeurIPS}, year={2022}}
@inproceedings{chevalier2023adapting,
  title={Adapting Language Models to Compress Contexts},
  author={Chevalier, Alexis and Wettig, Alexander and Ajith, Anirudh and Chen, Danqi},
  booktitle={EMNLP}, year={2023}}
@article{sivtsov2025diagonal,
  title={Diagonal Batching Unlocks Parallelism in Recurrent Memory Transformers for Long Contexts},
  author={Sivtsov, Danil and Rodkin, Ivan and Kuzmin, Gleb and Kuratov, Yuri and
    Oseledets, Ivan},
  journal={arXiv preprint arXiv:2506.05229}, year={2025}}"""

    def __init__(
        self,
        dims: Dims,
        parts: BlockParts,
        *,
        tokens: Annotated[int, Ge(1), Le(65_536)] = 8,
        chunk: Annotated[int, Ge(1), Le(1_048_576)] = 48,
        depth: Annotated[int, Ge(1), Le(4096)] = 1,
    ) -> None:
        super().__init__(dims, parts)
        self.chunk = chunk
        self.position_dependent_from = chunk + 1
        deep = dims._replace(n_layers=dims.n_layers * depth)
        self.layers = nn.ModuleList(
            MemoryLayer(deep._replace(layer=dims.layer * depth + i), parts) for i in range(depth)
        )
        self.memory_norm = parts.norm(dims)
        self.write = nn.Parameter(torch.empty(tokens, dims.d_model))  # W
        inner = [layer for layer in self.layers.modules() if isinstance(layer, Layer)]
        for layer in inner:
            require_fit(layer, tokens + chunk - 1)
        self.keeps_chunk = all(layer.reach != 0 for layer in inner if isinstance(layer, Mixer))

    def reset_parameters(self) -> None:
        """N(0, 1), the scale of the decoder's input after its norm."""
        nn.init.normal_(self.write)

    def forward(self, x: Tensor, state: State, context: LayerContext) -> LayerOutput:
        """[B, T, M] -> [B, T, M]; the state is {"memory": [B, m, M], "text": [B, n, M] the inputs
        of the incomplete chunk, "layers": what its layers keep of them}.
        """
        reading = Reading(x[:, :0], x[:, :0])
        if state:
            memory, text = state["memory"].to(x.dtype), state["text"].to(x.dtype)
            reading = Reading(memory, text, state["layers"])
        first = first_seen(context)
        outputs, start = [], 0
        while start < x.shape[1]:
            piece = slice(start, start + self.chunk - reading.text.shape[1])
            began = None if first is None else first[:, piece] - start
            out, reading = self.read(x[:, piece], reading, began, context)
            outputs.append(out)
            start = piece.stop
        # cut off again: a text of one chunk gives a gradient of zero, not none, to what writes
        unread = self.memory_norm(self.write).to(x.dtype).expand(x.shape[0], -1, -1)
        out = torch.cat((*outputs, unread), dim=1)[:, : x.shape[1]]
        return LayerOutput(out, reading._asdict())

    def read(
        self, x: Tensor, reading: Reading, began: Tensor | None, context: LayerContext
    ) -> tuple[Tensor, Reading]:
        """Read tokens [B, T, M] of one chunk: -> [B, T, M]. ``began`` [B or 1, T] is where the
        document of each began, counted from the first of them.
        """
        memory, text, states = reading
        whole_text = torch.cat((text, x), dim=1)
        held = text.shape[1] if self.keeps_chunk else 0  # tokens that the layers keep
        if not self.keeps_chunk:
            began = None if began is None else again(began, text.shape[1])
            x, states = whole_text, ()
        before = memory if held == 0 else memory[:, :0]
        ends = whole_text.shape[1] == self.chunk
        after = self.to_write(memory, x, began, held) if ends else memory[:, :0]
        visible = visible_from(began, held, memory.shape[1], before.shape[1], after.shape[1])
        sequence = torch.cat((before, x, after), dim=1)
        sequence, states = self.run_layers(sequence, states, visible, context)
        _, x, after = sequence.split((before.shape[1], x.shape[1], after.shape[1]), dim=1)
        out = x[:, text.shape[1] - held :]
        if ends:
            return out, Reading(self.memory_norm(after).to(x.dtype), text[:, :0])
        return out, Reading(memory, whole_text, states if self.keeps_chunk else ())

    def to_write(self, memory: Tensor, x: Tensor, began: Tensor | None, held: int) -> Tensor:
        """The memory tokens [B, m, M] after a chunk that ends with x; the memory counts where the
        document of the last token began before the chunk.
        """
        write = self.write.to(x.dtype).expand(x.shape[0], -1, -1)
        if not memory.shape[1]:
            return write
        if began is None:
            return memory + write
        has_memory = (began[:, -1] < -held)[:, None, None]  # [B or 1, 1, 1]
        return memory * has_memory + write

    def run_layers(
        self, x: Tensor, states: Sequence[State], visible: Tensor | None, context: LayerContext
    ) -> tuple[Tensor, tuple[State, ...]]:
        """All layers on a part of a chunk with its memory tokens [B, T, M], in which each token
        sees what ``visible`` says: -> [B, T, M] and the layers' states.
        """
        positions = torch.arange(x.shape[1], device=x.device)
        context = context._replace(positions=positions, first_visible=visible, carry={})
        next_states = []
        for i, layer in enumerate(self.layers):
            result = layer(x, states[i] if states else None, context)
            x = result.x
            next_states.append(result.state)
        return x, tuple(next_states)


def again(began: Tensor, size: int) -> Tensor:
    """Where documents began, for ``size`` tokens that are read again and those of ``began`` [B or
    1, T], counted from the first of all. Tokens of another document than the first new one's are
    seen by none of these: they see themselves.
    """
    began = began + size
    places = torch.arange(size, device=began.device)
    return torch.cat((began[:, :1].minimum(places), began), dim=1)


def visible_from(
    began: Tensor | None, held: int, memory: int, before: int, after: int
) -> Tensor | None:
    """The first position that each of [memory tokens, text, memory tokens] sees: those before see
    each other, those after see what the last token sees. None: nothing is hidden.

    Of a chunk, ``held`` tokens were read earlier, after ``memory`` tokens of which ``before`` are
    among these; a document sees them if it began before the chunk.
    """
    if began is None:
        return None
    own = torch.where(began < -held, -held - memory, began) + before  # [B or 1, T]
    reading = own.new_zeros(own.shape[0], before)
    return torch.cat((reading, own, own[:, -1:].expand(-1, after)), dim=1)


def require_fit(layer: Layer, length: int) -> None:
    """Raise Unsupported for a part that cannot stand in a chunk with memory tokens: it reads what
    other layers wrote of the text, counts its tokens, or keeps some but less than ``length``.
    """
    name = f"recurrent-tokens cannot hold {layer.name!r}"
    if layer.reads:
        raise Unsupported(
            f"{name}, which reads {', '.join(sorted(layer.reads))}: memory tokens have none"
        )
    if layer.loss_weights:
        raise Unsupported(
            f"{name} with its loss terms ({', '.join(sorted(layer.loss_weights))}), which count"
            " the tokens of the text; set their weights to 0"
        )
    if not isinstance(layer, SoftmaxAttention) or layer.window or layer.reach is None:
        return
    if 0 < layer.reach < length:
        raise Unsupported(
            f"{name}, whose memories keep {layer.reach} tokens: a chunk with its memory tokens has"
            f" {length} before the last; lengthen memory.xl, or shorten block.chunk"
        )


@hookimpl
def lswt_components() -> list[type]:
    """Offer recurrent memory tokens."""
    return [RecurrentTokens]
