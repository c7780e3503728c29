"""The decoder: pre-norm blocks after an input norm, x + attention(norm(x)) then x + ffn(norm(x)),
and an output norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lswt_core.interfaces import (
    FeedForward,
    Memory,
    Norm,
    PositionalEncoding,
    State,
)
from lswt_core.model.attention import Attention
from lswt_core.model.embedding import TiedEmbedding


class Block(nn.Module):
    """One layer: attention and feed-forward, each normed before and added after."""

    def __init__(
        self,
        attention_norm: Norm,
        attention: Attention,
        ffn_norm: Norm,
        ffn: FeedForward,
        positional: PositionalEncoding | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.positional = positional  # of this layer alone, in place of the decoder's

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        state: Mapping[str, State],
        first_visible: Tensor | None,
        positional: PositionalEncoding,
    ) -> tuple[Tensor, dict[str, State]]:
        """[B, T, M] -> [B, T, M] and the layer's next memory states."""
        own = positional if self.positional is None else self.positional
        attended, following = self.attention(
            self.attention_norm(x), positions, state, first_visible, own
        )
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), following


class Decoder(nn.Module):
    """The language model: ids to final states; its vocabulary turns states into logits or a loss."""

    def __init__(
        self,
        vocabulary: TiedEmbedding,
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
        # keep a block's input alone for the backward pass, and run the block again there
        self.activation_checkpointing = False

    def forward(
        self,
        inputs: Tensor,
        state: tuple[Mapping[str, State], ...] | None = None,
        first_visible: Tensor | None = None,
        first: int | Tensor = 0,
    ) -> tuple[Tensor, tuple[dict[str, State], ...]]:
        """Ids [B, T] and the last call's memory (None when cold) -> normed states [B, T, M] and the
        next memory, by layer. ``first`` is the coordinate of the first id, 0 unless memories number
        tokens from somewhere else; a tensor [] where the device alone knows.
        """
        return self.trunk(self.vocabulary.embed(inputs), state, first_visible, first)

    def trunk(
        self,
        x: Tensor,
        state: tuple[Mapping[str, State], ...] | None = None,
        first_visible: Tensor | None = None,
        first: int | Tensor = 0,
        visit: Callable[[Tensor], None] = lambda x: None,
    ) -> tuple[Tensor, tuple[dict[str, State], ...]]:
        """The same from embedded inputs x [B, T, M]. ``visit`` is shown every hidden state [B, T,
        M]: the input norm's, every block's and the output norm's.
        """
        positions = torch.arange(x.shape[1], device=x.device) + first
        x = self.input_norm(self.positional.embed(x, positions))
        visit(x)
        following = []
        for i, block in enumerate(self.blocks):
            given = (x, positions, state[i] if state else {}, first_visible, self.positional)
            again = self.activation_checkpointing and torch.is_grad_enabled()
            x, kept = checkpoint(block, *given, use_reentrant=False) if again else block(*given)
            visit(x)
            following.append(kept)
        x = self.output_norm(x)
        visit(x)
        return x, tuple(following)

    @property
    def reach(self) -> int:
        """How many tokens back the longest of its memories reaches; 0: nothing is kept from one
        call to the next.
        """
        memories = [module for module in self.modules() if isinstance(module, Memory)]
        return max((memory.length for memory in memories), default=0)
