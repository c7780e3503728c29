"""What one of several ranks holds of a model that FSDP2 cuts (see ``distributed.sharding``): its
pieces, and what is gathered and reduced at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from lswt_core.distributed.whole_matrices import share_out
from lswt_core.model.train_module import TrainModule

FLOAT32_BYTES = 4
GATHERED_BLOCKS = 2  # the next block is gathered while one is computed
Shape = tuple[int, ...]


class Weight(NamedTuple):
    """A parameter."""

    shape: Shape
    itemsize: int
    is_trained: bool

    @property
    def numel(self) -> int:
        """Numbers of the whole."""
        return math.prod(self.shape)

    def piece(self, shards: int) -> int:
        """Numbers of the first of ``shards`` ranks: of the first dimension's, rounded up."""
        return -(-self.shape[0] // shards) * math.prod(self.shape[1:])


class RankModel(NamedTuple):
    """A model's parameters by what is gathered together, and the optimizer's state."""

    blocks: tuple[tuple[Weight, ...], ...]
    root: tuple[Weight, ...]  # of no block: vocabulary, head, last norm
    # bytes of the optimizer's state for all parameters of a shape
    alike: Mapping[Shape, int]  # of tensors of the parameter's shape, which are cut as it is
    beside: Mapping[Shape, int]  # of others, which every rank has whole
    gathered: int | None  # bytes per number that parameters are gathered in; None: their own
    half: int  # bytes per number of the compute precision
    updates_matrices: bool  # the optimizer updates whole matrices, in turns (``WholeMatrices``)

    @property
    def weights(self) -> list[Weight]:
        """All parameters."""
        return [weight for unit in (*self.blocks, self.root) for weight in unit]

    @property
    def trained(self) -> list[Weight]:
        """The parameters that require gradients."""
        return [weight for weight in self.weights if weight.is_trained]

    def of_rank(self, whole: Mapping[str, int], shards: int, recomputes: bool) -> dict[str, int]:
        """Bytes of the first rank of a replica by part. ``whole``: the parts of a single process;
        what is unknown there is absent. ``recomputes``: with activation checkpointing.
        """
        gradients = sum(w.numel * w.itemsize for w in self.trained)
        times = whole["gradients"] // gradients if gradients else 0  # 2: of data, and sampled
        numbers = sum(w.piece(shards) for w in self.trained)
        pieces = [(w, w.piece(shards) * w.itemsize) for w in self.weights]
        parts = {
            "weights": sum(size for _, size in pieces),
            "gradients": times * sum(size for w, size in pieces if w.is_trained),
            "gathered": self.gathered_bytes(),
            "reduce": self.reduce_bytes(shards),
        }
        if casts := self.cast_bytes(recomputes):
            parts["cast_weights"] = casts
        if "average" in whole:
            parts["average"] = FLOAT32_BYTES * numbers
        if "optimizer" in whole:
            parts |= self.optimizer_bytes(shards)
        return parts

    def in_gathered(self, weight: Weight) -> int:
        """Bytes of a parameter once it is gathered."""
        return weight.numel * (self.gathered or weight.itemsize)

    def gathered_bytes(self) -> int:
        """Bytes of the parameters that are gathered at once: the root's during the whole pass."""
        sizes = sorted((sum(map(self.in_gathered, block)) for block in self.blocks), reverse=True)
        return sum(map(self.in_gathered, self.root)) + sum(sizes[:GATHERED_BLOCKS])

    def reduce_bytes(self, shards: int) -> int:
        """Bytes of gradients on their way to the pieces: a block's, of the dtype that it was
        gathered in, their float32 copy, and what comes of it; and the root's until the end.
        """

        def unreduced(unit: Iterable[Weight]) -> int:
            return sum(self.in_gathered(w) for w in unit if w.is_trained)

        def reducing(unit: Iterable[Weight]) -> int:
            numbers = sum(w.numel + w.piece(shards) for w in unit if w.is_trained)
            return unreduced(unit) + FLOAT32_BYTES * numbers

        return unreduced(self.root) + max(map(reducing, self.blocks), default=0)

    def cast_bytes(self, recomputes: bool) -> int:
        """Bytes of weights that autocast casts and keeps for the backward pass: of those that were
        not gathered in the compute precision.
        """

        def cast(unit: Iterable[Weight]) -> int:
            return self.half * sum(
                w.numel for w in unit if (self.gathered or w.itemsize) != self.half
            )

        sizes = [cast(block) for block in self.blocks]
        return cast(self.root) + (max(sizes, default=0) if recomputes else sum(sizes))

    def optimizer_bytes(self, shards: int) -> dict[str, int]:
        """Bytes of the optimizer's state, and of the whole matrices that a rank updates."""
        if self.updates_matrices:
            return self.matrix_bytes(shards)
        pieces, counts = dict[Shape, int](), dict[Shape, int]()
        for w in self.trained:
            counts[w.shape] = counts.get(w.shape, 0) + w.numel
            pieces[w.shape] = pieces.get(w.shape, 0) + w.piece(shards)
        cut = sum(self.alike.get(s, 0) * pieces[s] // counts[s] for s in pieces)
        return {"optimizer": cut + sum(self.beside.values())}

    def matrix_bytes(self, shards: int) -> dict[str, int]:
        """As ``optimizer_bytes``: of the rank that has most, its matrices and their gradients in
        float32, and one more that is handed on.
        """
        trained, shapes = self.trained, [w.shape for w in self.trained]
        owners = share_out([w.numel for w in trained], shards)
        states, numbers = [0] * shards, [0] * shards
        for weight, owner in zip(trained, owners, strict=True):
            both = self.alike.get(weight.shape, 0) + self.beside.get(weight.shape, 0)
            states[owner] += both // shapes.count(weight.shape)
            numbers[owner] += weight.numel
        handed = max((w.numel for w in trained), default=0)
        most = max(range(shards), key=lambda rank: states[rank] + 2 * FLOAT32_BYTES * numbers[rank])
        return {
            "optimizer": states[most],
            "whole_matrices": FLOAT32_BYTES * (2 * numbers[most] + handed),
        }


NO_MODEL = RankModel((), (), {}, {}, None, FLOAT32_BYTES, False)


def weights_of(parameters: Iterable[Tensor]) -> tuple[Weight, ...]:
    """Parameters on the meta device as ``Weight``."""
    return tuple(Weight(tuple(p.shape), p.itemsize, p.requires_grad) for p in parameters)


def units_of(loss: TrainModule) -> tuple[tuple[tuple[Weight, ...], ...], tuple[Weight, ...]]:
    """The parameters of every block, and those of none."""
    blocks = [list(block.parameters()) for block in loss.decoder.blocks]
    inside = {p for block in blocks for p in block}
    rest = [p for p in loss.parameters() if p not in inside]
    return tuple(map(weights_of, blocks)), weights_of(rest)


def shape_key(shape: Iterable[int]) -> str:
    """A shape as a word: "4096x1024"."""
    return "x".join(map(str, shape))


def by_shape(amounts: Mapping[str, int]) -> dict[Shape, int]:
    """Amounts by ``shape_key`` as amounts by shape."""
    return {tuple(map(int, key.split("x"))): amount for key, amount in amounts.items()}
