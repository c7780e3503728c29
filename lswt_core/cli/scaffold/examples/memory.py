"""A memory: a KV cache of the last tokens."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State


class Example(Memory):
    """Every layer attends to its last ``length`` keys and values of earlier segments, kept as they
    were computed, without gradient.
    """

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, dims: Dims, *, length: Annotated[int, Ge(1)] = 128) -> None:
        super().__init__(dims)
        self.length = length

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Change this: what is attended to, and the next state, which is returned and never stored
        on ``self``. x [B, T, M], positions [T].
        """
        *others, new = project(x, positions)
        k, v = new.k.detach(), new.v.detach()  # [B, T, H, D]
        if state is not None:
            old_k, old_v = state["k"].to(k.dtype), state["v"].to(v.dtype)  # [B, N, H, D]
            old_positions = torch.arange(-old_k.shape[1], 0, device=positions.device)
            others.append(KeyValue(old_k, old_v, old_positions))
            k, v = torch.cat((old_k, k), dim=1), torch.cat((old_v, v), dim=1)
        return [*others, new], {"k": k[:, -self.length :], "v": v[:, -self.length :]}


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
