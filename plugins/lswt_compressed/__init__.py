"""The Compressive Transformer's memory: recent tokens one by one, older ones by the block."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State


class Compressed(Memory):
    """Attend to the last ``length`` tokens before the segment, and to the means of ``slots`` blocks
    of ``rate`` tokens before those.

    After the Compressive Transformer (Rae et al. 2020, arXiv 1911.05507), with mean pooling, the
    one of its compressions that has no weights: those of the others are trained by an auxiliary
    loss, which the memories' inputs alone cannot give.

    As in xl-hidden, the layer's normed inputs are kept, without gradient, and projected anew at
    every call. A block of ``rate`` tokens is compressed as soon as it is older than ``length``;
    until it is complete its tokens stay as they are. It stands where its first token stood, so that
    it is hidden where one of its tokens is: what belongs to two documents is seen by neither.

    What is kept depends on the number of tokens read, counted from the text's first, and not on how
    they were cut into calls. What a query sees does depend on it, once anything is compressed: how
    far back tokens are seen one by one is counted from the segment's first. Segments of a multiple
    of ``rate`` tokens keep the shapes of the memory as they are.
    """

    name = "compressed"
    citation = """@inproceedings{rae2020compressive,
  title={Compressive Transformers for Long-Range Sequence Modelling},
  author={Rae, Jack W and Potapenko, Anna and Jayakumar, Siddhant M and Hillier, Chloe and Lillicrap, Timothy P},
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
        # with all but one token of a block that is not complete
        self.length = length + rate - 1 + rate * slots
        self.position_dependent_from = length + rate

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Project what is remembered and the new segment together; remember both, what became too
        old by the block.
        """
        if state is None:
            *others, new = project(x, positions)
            return [*others, new], self.keep(x[:, :0].detach(), x.detach(), new.k.dtype)
        # [B, m, M], [B, n, M]
        blocks, recent = (state[key].to(x.dtype) for key in ("blocks", "recent"))
        m, n = blocks.shape[1], recent.shape[1]
        firsts = torch.arange(-m, 0, device=positions.device) * self.rate - n
        places = torch.cat((firsts, torch.arange(-n, 0, device=positions.device)))  # [m + n]
        *others, every = project(
            torch.cat((blocks, recent, x), dim=1), torch.cat((places, positions))
        )
        remembered = KeyValue(every.k[:, : m + n], every.v[:, : m + n], places)
        new = KeyValue(every.k[:, m + n :], every.v[:, m + n :], positions)
        return [*others, remembered, new], self.keep(
            blocks, torch.cat((recent, x.detach()), dim=1), every.k.dtype
        )

    def keep(self, blocks: Tensor, tokens: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The next state, from compressed blocks [B, m, M] and the tokens [B, n, M] that follow
        them.
        """
        complete = max(0, tokens.shape[1] - self.recent) // self.rate
        taken = complete * self.rate
        means = tokens[:, :taken].unflatten(1, (complete, self.rate)).mean(2)  # [B, complete, M]
        kept = {
            "blocks": torch.cat((blocks, means), dim=1)[:, -self.slots :],
            "recent": tokens[:, taken:],
        }
        return {name: tensor.to(dtype) for name, tensor in kept.items()}


@hookimpl
def lswt_components() -> list[type]:
    """Offer the compressed memory."""
    return [Compressed]
