"""The Compressive Transformer's memory: recent tokens, and older ones compressed."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State


class Compressed(Memory):
    """Attend to the last ``length`` tokens before the segment, and to ``slots`` compressed memories
    of ``rate`` tokens each before those.

    The Compressive Transformer (Rae et al. 2020, arXiv 1911.05507) with mean pooling, its one
    compression function without weights; those of the others are trained by an auxiliary loss.

    As in xl-hidden, the layer's inputs after its norm are kept, without gradient, and projected
    again at every call. A group of ``rate`` tokens is compressed once all of them are older than
    ``length``. A compressed memory has the position of its first token, so that document masking
    hides it if it spans two documents.

    The state depends on the number of tokens read so far, not on how they were split into segments.
    Hidden states do depend on the split once anything is compressed: ``length`` is counted from the
    start of the segment. Segments of a multiple of ``rate`` tokens keep the shapes of the state
    constant.
    """

    name = "compressed"
    citation = """@inproceedings{rae2020compressive,
  title={Compressive Transformers for Long-Range Sequence Modelling},
  author={Rae, Jack W and Potapenko, Anna and Jayakumar, Siddhant M and Hillier, Chloe and
    Lillicrap, Timothy P},
  booktitle={ICLR}, year={2020}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        length: Annotated[int, Ge(1), Le(1_048_576)] = 512,
        slots: Annotated[int, Ge(1), Le(1_048_576)] = 512,
        rate: Annotated[int, Ge(1)] = 3,
    ) -> None:
        super().__init__(dims)
        self.recent, self.slots, self.rate = length, slots, rate
        # rate - 1: tokens of a group that is not complete
        self.length = length + rate - 1 + rate * slots
        self.position_dependent_from = length + rate

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Project the memory and the new segment together; keep both, old tokens compressed."""
        if state is None:
            *others, new = project(x, positions)
            return [*others, new], self.next_state(x[:, :0].detach(), x.detach(), new.k.dtype)
        compressed, recent = state["blocks"].to(x.dtype), state["recent"].to(x.dtype)
        m, n = compressed.shape[1], recent.shape[1]  # compressed [B, m, M], recent [B, n, M]
        compressed_positions = torch.arange(-m, 0, device=positions.device) * self.rate - n
        recent_positions = torch.arange(-n, 0, device=positions.device)
        old_positions = torch.cat((compressed_positions, recent_positions))  # [m + n]
        *others, both = project(
            torch.cat((compressed, recent, x), dim=1), torch.cat((old_positions, positions))
        )
        old = block_part(both, slice(None, m + n), old_positions)
        new = block_part(both, slice(m + n, None), positions)
        tokens = torch.cat((recent, x.detach()), dim=1)
        return [*others, old, new], self.next_state(compressed, tokens, both.k.dtype)

    def next_state(
        self, compressed: Tensor, tokens: Tensor, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The next state, from compressed memories [B, m, M] and the later tokens [B, n, M]."""
        groups = max(0, tokens.shape[1] - self.recent) // self.rate
        old = groups * self.rate
        means = tokens[:, :old].unflatten(1, (groups, self.rate)).mean(2)  # [B, groups, M]
        compressed = torch.cat((compressed, means), dim=1)[:, -self.slots :]
        return {"blocks": compressed.to(dtype), "recent": tokens[:, old:].to(dtype)}


def block_part(block: KeyValue, tokens: slice, positions: Tensor) -> KeyValue:
    """Some tokens of a block, at their positions."""
    features = None if block.features is None else block.features[:, tokens]
    return KeyValue(block.k[:, tokens], block.v[:, tokens], positions, features=features)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the compressed memory."""
    return [Compressed]
