"""Optimizers that update whole matrices, on parameters that are cut over ranks: the ranks of a
replica take turns, each with the matrices that it updates for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lswt_core.errors import Incompatible
from lswt_core.interfaces import Optimizer
from lswt_core.plugin_api.sharded_tensor import full_tensor, local_tensor, shard_like
from lswt_core.plugin_api.wrapped_optimizer import WrappedOptimizer


class WholeMatrices(WrappedOptimizer):
    """An optimizer of ``Optimizer.unit`` "matrix" over sharded parameters. Every rank gives it a
    part of them, gathered whole, and hands out what it made of them.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        build: Callable[[list[dict[str, Any]]], Optimizer],
    ) -> None:
        """``groups`` as of ``build_parameter_groups``; ``build`` makes the optimizer of some."""
        self.sharded: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        mesh = self.sharded[0].device_mesh  # type: ignore[attr-defined]
        self.turns = mesh.get_group("shards")
        self.owners = share_out([p.numel() for p in self.sharded], self.turns.size())
        # by its number in ``sharded``: a whole copy of each parameter that this rank updates
        self.whole: dict[int, nn.Parameter] = {}
        for i, p in enumerate(self.sharded):
            whole = full_tensor(p)  # a collective of all ranks
            if self.owners[i] == self.turns.rank():
                self.whole[i] = nn.Parameter(whole)
        super().__init__(self.own_groups(groups), build)
        inner: Any = self._inner
        if inner.hessian_update_interval:
            raise Incompatible(
                f"optimizer {inner.name!r} updates whole matrices and estimates curvature, which"
                " several ranks cannot do; train on one"
            )

    def own_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The groups with the parameters that this rank updates."""
        number = {p: i for i, p in enumerate(self.sharded)}
        own = []
        for group in groups:
            kept = [(n, number[p]) for n, p in zip(group["names"], group["params"], strict=True)]
            kept = [(name, i) for name, i in kept if i in self.whole]
            names = [name for name, _ in kept]
            own.append(
                {
                    **group,
                    "params": [self.whole[i] for _, i in kept],
                    "names": names,
                    "matrices": [name for name in group["matrices"] if name in names],
                }
            )
        return own

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        self.take_weights()
        for i, p in enumerate(self.sharded):
            gradient = None if p.grad is None else full_tensor(p.grad)
            if i in self.whole:
                self.whole[i].grad = gradient
        result = super().step(closure)
        for whole in self.whole.values():
            whole.grad = None
        self.hand_out()
        return result

    @torch.no_grad()
    def take_weights(self) -> None:
        """Gather what the parameters hold, which others may have changed."""
        for i, p in enumerate(self.sharded):
            weight = full_tensor(p)  # a collective of all ranks
            if i in self.whole:
                self.whole[i].copy_(weight)

    @torch.no_grad()
    def hand_out(self) -> None:
        """Give every rank its piece of what the owners have."""
        for i, p in enumerate(self.sharded):
            if i in self.whole:
                whole = self.whole[i].detach()
            else:
                whole = torch.empty(p.shape, dtype=p.dtype, device=p.device)
            dist.broadcast(whole, group=self.turns, group_src=self.owners[i])
            local_tensor(p).copy_(local_tensor(shard_like(whole, p)))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model."""
        for p in self.sharded:
            p.grad = None

    @contextmanager
    def eval_parameters(self) -> Iterator[None]:
        """As the optimizer's, for the model's parameters."""
        inner: Any = self._inner
        if type(inner).eval_parameters is Optimizer.eval_parameters:
            yield
            return
        self.take_weights()
        with inner.eval_parameters():
            self.hand_out()
            yield
        self.hand_out()

    def statistics(self) -> dict[str, Tensor]:
        """None: numbers about some matrices say nothing about all."""
        return {}


def share_out(numbers: Sequence[int], ranks: int) -> list[int]:
    """The rank that updates each parameter, from their numbers of elements: in order of their
    size, each goes to the rank that has the least so far.
    """
    load, owners = [0] * ranks, [0] * len(numbers)
    for i in sorted(range(len(numbers)), key=lambda i: -numbers[i]):
        owners[i] = min(range(ranks), key=load.__getitem__)
        load[owners[i]] += numbers[i]
    return owners
