"""A KV cache that keeps the last tokens, and of older ones every k-th."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State


class SparseXl(Memory):
    """Attend to the last ``length`` tokens before the segment, and to every ``stride``-th token
    before those, ``slots`` of them at most.

    The strided pattern is that of sparse transformers (Child et al. 2019, arXiv 1904.10509), here
    in all heads and beyond the segment. Tokens leave the dense part in groups of ``stride``, of
    which the last is kept, so that up to ``stride - 1`` more than ``length`` are dense. Groups are
    counted from the beginning of the row. As in xl-cache, un-rotated keys and values are cached,
    without gradient; ``stride`` = 1 is an xl-cache of ``length + slots``.
    """

    name = "sparse-xl"
    citation = """@article{child2019generating,
  title={Generating Long Sequences with Sparse Transformers},
  author={Child, Rewon and Gray, Scott and Radford, Alec and Sutskever, Ilya},
  journal={arXiv preprint arXiv:1904.10509}, year={2019}}"""

    def __init__(
        self,
        dims: Dims,
        *,
        length: Annotated[int, Ge(1), Le(1_048_576)] = 512,
        slots: Annotated[int, Ge(1), Le(1_048_576)] = 512,
        stride: Annotated[int, Ge(1), Le(1_048_576)] = 8,
    ) -> None:
        super().__init__(dims)
        self.dense, self.slots, self.stride = length, slots, stride
        # stride - 1: tokens of a group that is not complete
        self.length = length + stride - 1 + stride * slots
        self.position_dependent_from = length + stride

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Put the sparse and the dense cache before the new segment, as one block; keep both."""
        *others, new = project(x, positions)
        fields = {"k": new.k.detach(), "v": new.v.detach()}
        if new.features is not None:
            fields["features"] = new.features.detach()
        if state is None:
            empty = {name: t[:, :0] for name, t in fields.items()}
            return [*others, new], self.next_state(empty, fields)
        # another dtype if a run was resumed in another precision
        sparse = {name: state["sparse"][name].to(t.dtype) for name, t in fields.items()}
        dense = {name: state["dense"][name].to(t.dtype) for name, t in fields.items()}
        m, n = sparse["k"].shape[1], dense["k"].shape[1]
        sparse_positions = torch.arange(1 - m, 1, device=positions.device) * self.stride - n - 1
        dense_positions = torch.arange(-n, 0, device=positions.device)
        old = {name: torch.cat((sparse[name], dense[name]), dim=1) for name in fields}
        cached = KeyValue(
            old["k"],
            old["v"],
            torch.cat((sparse_positions, dense_positions)),
            features=old.get("features"),
        )
        tokens = {name: torch.cat((dense[name], t), dim=1) for name, t in fields.items()}
        return [*others, cached, new], self.next_state(sparse, tokens)

    def next_state(
        self, sparse: dict[str, Tensor], tokens: dict[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """The next state, from the sparse cache and the tokens after it, dimension 1."""
        leaving = max(0, tokens["k"].shape[1] - self.dense) // self.stride * self.stride
        kept = {
            name: torch.cat((sparse[name], t[:, self.stride - 1 : leaving : self.stride]), dim=1)
            for name, t in tokens.items()
        }
        return {
            "sparse": {name: t[:, -self.slots :] for name, t in kept.items()},
            "dense": {name: t[:, leaving:] for name, t in tokens.items()},
        }


@hookimpl
def lswt_components() -> list[type]:
    """Offer the sparse memory."""
    return [SparseXl]
