"""The decoder: embedding, an input norm, blocks around one residual stream, an output norm, and the
LM head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lswt_core.interfaces import (
    Block,
    Head,
    Layer,
    LayerContext,
    LossSum,
    Mixer,
    Norm,
    PositionalEncoding,
    State,
)
from lswt_core.plugin_api.blocks import add_losses

# what the decoder itself writes for layers to read (LayerContext.carry)
IDS, EMBEDDINGS = "ids", "embeddings"


class Decoder(nn.Module):
    """The language model: token ids to final hidden states; ``vocabulary`` turns these into logits
    or a cross-entropy.
    """

    def __init__(
        self,
        vocabulary: Head,
        positional: PositionalEncoding,
        input_norm: Norm,
        blocks: list[Block],
        output_norm: Norm,
    ) -> None:
        super().__init__()
        self.vocabulary, self.positional = vocabulary, positional
        self.input_norm = input_norm
        self.blocks = nn.ModuleList(blocks)
        self.output_norm = output_norm
        # what layers read of the decoder's inputs
        self.reads = {name for layer in self.layers() for name in layer.reads} & {IDS, EMBEDDINGS}
        # keep only the inputs of each block, and recompute the block in the backward pass
        self.activation_checkpointing = False

    def forward(
        self,
        inputs: Tensor,
        state: tuple[Mapping[str, State], ...] | None = None,
        first_visible: Tensor | None = None,
        first: int | Tensor = 0,
        *,
        losses: dict[str, LossSum] | None = None,
    ) -> tuple[Tensor, tuple[dict[str, State], ...]]:
        """Token ids [B, T] -> normed hidden states [B, T, M] and the next state by layer.

        ``state`` is what the last call returned, None at the start. ``first`` is the position of
        the first id, 0 unless cached keys are numbered otherwise; a tensor [] in a CUDA graph.
        Loss terms of layers are added to ``losses``.
        """
        x = self.vocabulary.embed(inputs)
        return self.trunk(x, state, first_visible, first, ids=inputs, losses=losses)

    def trunk(
        self,
        x: Tensor,
        state: tuple[Mapping[str, State], ...] | None = None,
        first_visible: Tensor | None = None,
        first: int | Tensor = 0,
        *,
        ids: Tensor | None = None,
        losses: dict[str, LossSum] | None = None,
        visit: Callable[[Tensor], None] = lambda x: None,
    ) -> tuple[Tensor, tuple[dict[str, State], ...]]:
        """``forward`` from input embeddings x [B, T, M]. ``visit`` is called with every hidden
        state [B, T, M]: after the input norm, each block and the output norm. Raises ValueError if
        a layer reads token ids and there are none.
        """
        positions = torch.arange(x.shape[1], device=x.device) + first
        x = self.input_norm(self.positional.embed(x, positions))
        visit(x)
        carry = self.initial_carry(ids, x)
        x = self.first_block.open_stream(x)
        next_states = []
        for i, block in enumerate(self.blocks):
            context = LayerContext(positions, first_visible, self.positional_of(block), carry)
            out = self.run_block(block, x, state[i] if state else None, context)
            x, carry = out.x, {**carry, **out.carry}
            if losses is not None:
                add_losses(losses, out.losses)
            visit(self.last_block.close_stream(x))
            next_states.append(out.state or {})
        x = self.output_norm(self.last_block.close_stream(x))
        visit(x)
        return x, tuple(next_states)

    def positional_of(self, block: Any) -> PositionalEncoding:
        """The positional encoding of a block: its own or the model's."""
        own: PositionalEncoding | None = block.positional
        return self.positional if own is None else own

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """Run one block, or keep its inputs alone and run it again in the backward pass."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def initial_carry(self, ids: Tensor | None, embeddings: Tensor) -> dict[str, Tensor]:
        """What the decoder hands to layers that read it."""
        carry = {}
        if IDS in self.reads:
            if ids is None:
                raise ValueError("a layer of this model reads token ids: give ids, not embeddings")
            carry[IDS] = ids
        if EMBEDDINGS in self.reads:
            carry[EMBEDDINGS] = embeddings
        return carry

    @property
    def first_block(self) -> Block:
        """The block that opens the residual stream."""
        return self.blocks[0]  # type: ignore[return-value]

    @property
    def last_block(self) -> Block:
        """The block that closes the residual stream."""
        return self.blocks[-1]  # type: ignore[return-value]

    def layers(self) -> Iterator[Layer]:
        """Every block, mixer and feed-forward layer, parents before their parts."""
        for module in self.blocks.modules():
            if isinstance(module, Layer):
                yield module

    @property
    def memory_length(self) -> int:
        """How many tokens back the longest state reaches that is bounded; replaying so many tokens
        rebuilds all states unless ``is_recurrent``.
        """
        return max((layer.reach or 0 for layer in self.layers()), default=0)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer's state depends on all of the past."""
        return any(layer.reach is None for layer in self.layers())

    @property
    def keeps_state(self) -> bool:
        """Whether states are kept between calls."""
        return self.is_recurrent or self.memory_length > 0

    @property
    def can_read_on(self) -> bool:
        """Whether the mixer of every layer sees tokens of earlier calls, by its own state or that
        of a layer below, so that a text can be read on token by token. Otherwise earlier tokens
        must be read again: to some layers they are lost.
        """
        return all(
            any(sees_past(mixer) for mixer in block.modules() if isinstance(mixer, Mixer))
            for block in self.blocks
        )


def sees_past(mixer: Mixer) -> bool:
    """Whether a mixer sees tokens of earlier calls: by its own state, or that of a layer below."""
    return mixer.reach != 0 or mixer.sees_past_of_others
