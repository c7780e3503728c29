"""The decoder: an input norm, pre-norm blocks, x + attention(norm(x)) then x + ffn(norm(x)), and
an output norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lswt_core.interfaces import FeedForward, Memory, Norm, PositionalEncoding, State
from lswt_core.model.attention import Attention
from lswt_core.model.embedding import TiedEmbedding


class Block(nn.Module):
    """One pre-norm transformer layer."""

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
        self.positional = positional  # this layer's own; None: the decoder's

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        state: Mapping[str, State],
        first_visible: Tensor | None,
        positional: PositionalEncoding,
    ) -> tuple[Tensor, dict[str, State]]:
        """[B, T, M] -> [B, T, M] and the next state of the layer's memories."""
        if self.positional is not None:
            positional = self.positional
        attended, next_state = self.attention(
            self.attention_norm(x), positions, state, first_visible, positional
        )
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), next_state


class Decoder(nn.Module):
    """The language model: token ids to final hidden states; ``vocabulary`` turns these into logits
    or a cross-entropy.
    """

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
        # keep only the inputs of each block, and recompute the block in the backward pass
        self.activation_checkpointing = False

    def forward(
        self,
        inputs: Tensor,
        state: tuple[Mapping[str, State], ...] | None = None,
        first_visible: Tensor | None = None,
        first: int | Tensor = 0,
    ) -> tuple[Tensor, tuple[dict[str, State], ...]]:
        """Token ids [B, T] -> normed hidden states [B, T, M] and the memories' next state by layer.

        ``state`` is what the last call returned, None at the start. ``first`` is the position of
        the first id, 0 unless cached keys are numbered otherwise; a tensor [] in a CUDA graph.
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
        """``forward`` from input embeddings x [B, T, M]. ``visit`` is called with every hidden
        state [B, T, M]: after the input norm, each block and the output norm.
        """
        positions = torch.arange(x.shape[1], device=x.device) + first
        x = self.input_norm(self.positional.embed(x, positions))
        visit(x)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        next_states = []
        for i, block in enumerate(self.blocks):
            args = (x, positions, state[i] if state else {}, first_visible, self.positional)
            if recompute:
                x, next_state = checkpoint(block, *args, use_reentrant=False)
            else:
                x, next_state = block(*args)
            visit(x)
            next_states.append(next_state)
        x = self.output_norm(x)
        visit(x)
        return x, tuple(next_states)

    @property
    def memory_length(self) -> int:
        """How many tokens back the longest memory reaches; 0: no state is kept between calls."""
        memories = [module for module in self.modules() if isinstance(module, Memory)]
        return max((memory.length for memory in memories), default=0)
