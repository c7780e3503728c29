"""What optimizers share: a state of full precision that survives a save, and parameters taken a
bucket at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from lswt_core.interfaces import Optimizer

BUCKET = 1 << 24  # elements, 64 MB in float32: enough to fill any device
BUCKET_CPU = 1 << 18  # of which all that an update touches stays in a core's own cache


class Piece(NamedTuple):
    """A parameter, or a stretch of it, with what belongs to it."""

    p: Tensor
    gradient: Tensor
    state: dict[str, Any]


class BucketOptimizer(Optimizer, ABC):
    """An optimizer that says how pieces of parameters are updated, whatever their shape: coordinate
    by coordinate.

    Moments are made by ``zeros`` and may be kept in a narrower precision than they are computed in,
    ``moments``.
    """

    moments: torch.dtype = torch.float32

    @abstractmethod
    def prepare(self, group: dict[str, Any], p: Tensor) -> dict[str, Any]:
        """The state of a parameter, made at its first step and its counters moved on: once a step."""

    @abstractmethod
    def update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        gradients: list[Tensor],
        states: list[dict[str, Any]],
    ) -> None:
        """Update pieces of a group's parameters, and the moments in their states, in place;
        gradients are in the moments' precision.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            whole = (
                Piece(p, p.grad, self.prepare(group, p))
                for p in group["params"]
                if p.grad is not None
            )
            for bucket in buckets([part for piece in whole for part in parts_of(piece)]):
                self.update_wide(group, bucket)
        return loss

    def update_wide(self, group: dict[str, Any], pieces: list[Piece]) -> None:
        """Update pieces in float32 at least, whatever they are kept in."""
        wide = [{key: widened(value) for key, value in piece.state.items()} for piece in pieces]
        gradients = [
            piece.gradient.to(torch.promote_types(piece.gradient.dtype, torch.float32))
            for piece in pieces
        ]
        self.update(group, [piece.p for piece in pieces], gradients, wide)
        for piece, state in zip(pieces, wide, strict=True):
            for key, value in piece.state.items():
                if isinstance(value, Tensor) and state[key] is not value:
                    value.copy_(state[key])

    def zeros(self, p: Tensor) -> Tensor:
        """Where a moment of a parameter starts: zeros of its shape, in float32 even for narrower
        parameters unless ``moments`` says otherwise.
        """
        return torch.zeros_like(
            p,
            dtype=(
                torch.promote_types(p.dtype, torch.float32)
                if self.moments == torch.float32
                else self.moments
            ),
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; raises ValueError for an option that is one for all parameters."""
        common = (
            get_type_hints(type(self).__init__).keys() - self.defaults.keys() - {"groups", "return"}
        )
        if given := sorted(common & param_group.keys()):
            raise ValueError(
                f"optimizer {self.name!r} has one {' and one '.join(given)} for all parameters,"
                " none by group"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state in its own precision; torch alone would round it to that of the
        parameters.
        """
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    self.state[p][key] = value.to(p.device) if isinstance(value, Tensor) else value


def require_bounds(optimizer: type[Optimizer], **options: float) -> None:
    """Raise ValueError for an option outside of the bounds that its annotation states, as torch's
    optimizers do for theirs.
    """
    hints = get_type_hints(optimizer.__init__, include_extras=True)
    for name, value in options.items():
        for bound in getattr(hints.get(name), "__metadata__", ()):
            if not satisfies(value, bound):
                raise ValueError(
                    f"invalid {name} of optimizer {optimizer.name!r}: {value}, but it has {bound}"
                )


def satisfies(value: Any, bound: Any) -> bool:
    """Whether a number keeps a bound; NaN keeps none."""
    match bound:
        case Gt(gt=limit):
            return bool(value > limit)
        case Ge(ge=limit):
            return bool(value >= limit)
        case Lt(lt=limit):
            return bool(value < limit)
        case Le(le=limit):
            return bool(value <= limit)
    raise TypeError(f"{bound} is no bound of a number")


def like(values: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Values in the precision of their targets."""
    return [value.to(target.dtype) for value, target in zip(values, targets, strict=True)]


def widened(value: Any) -> Any:
    """A narrow moment in float32; anything else as it is."""
    return (
        value.float()
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
        else value
    )


def parts_of(piece: Piece) -> Iterator[Piece]:
    """A parameter whole, or in stretches where all they touch would not stay in a CPU's cache."""
    moments = {
        key: value
        for key, value in piece.state.items()
        if isinstance(value, Tensor) and value.shape == piece.p.shape
    }
    cut = piece.p.device.type == "cpu" and piece.p.numel() > BUCKET_CPU
    if not cut or not all(
        tensor.is_contiguous() for tensor in (piece.p, piece.gradient, *moments.values())
    ):
        yield piece
        return
    columns = [
        tensor.view(-1).split(BUCKET_CPU) for tensor in (piece.p, piece.gradient, *moments.values())
    ]
    for p, gradient, *rest in zip(*columns, strict=True):
        yield Piece(p, gradient, piece.state | dict(zip(moments, rest, strict=True)))


def buckets(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces in runs of about a bucket's elements, so that a step's temporaries stay small beside
    the model.
    """
    bucket: list[Piece] = []
    for piece in pieces:
        bucket.append(piece)
        if sum(member.p.numel() for member in bucket) >= (
            BUCKET_CPU if piece.p.device.type == "cpu" else BUCKET
        ):
            yield bucket
            bucket = []
    if bucket:
        yield bucket
