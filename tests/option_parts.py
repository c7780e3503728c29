"""A single-file plugin of components that hold components, for tests of recipes: a chain of
feed-forward layers that remembers what its constructor got.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Optional

from annotated_types import Ge
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AuxiliaryLoss, Batch, Dims, FeedForward, LossSum, Output, Schedule


class Wrapped(FeedForward):
    """What it wraps, ``times`` times as large."""

    name = "wrapped"
    citation = "@misc{wrapped}"

    def __init__(
        self, dims: Dims, *, inner: FeedForward, times: Annotated[float, Ge(0)] = 2.0
    ) -> None:
        super().__init__(dims)
        self.inner, self.times = inner, times

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        return self.times * self.inner(x)


class Chain(FeedForward):
    """One layer after the other, in the order of their names, and one that may be missing."""

    name = "chain"
    citation = "@misc{chain}"

    def __init__(
        self,
        dims: Dims,
        *,
        layers: Mapping[str, Callable[[Dims], FeedForward]],
        last: Optional[FeedForward] = None,  # noqa: UP045
        width: Annotated[int, Ge(1)] = 4,
    ) -> None:
        super().__init__(dims)
        narrow = dims._replace(d_ffn=width)
        self.layers = nn.ModuleDict({name: layer(narrow) for name, layer in layers.items()})
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        for layer in self.layers.values():
            x = layer(x)
        return x if self.last is None else self.last(x)


class Half(AuxiliaryLoss):
    """Half of another loss."""

    name = "halved"
    citation = "@misc{halved}"

    def __init__(self, dims: Dims, *, inner: AuxiliaryLoss) -> None:
        super().__init__(dims)
        self.inner = inner
        self.needs = inner.needs

    def forward(self, out: Output, batch: Batch) -> LossSum:
        """Half of the sum, the same count."""
        total, count = self.inner(out, batch)
        return LossSum(total / 2, count)


class Squared(Schedule):
    """The square of another schedule."""

    name = "squared"

    def __init__(self, horizon: object, *, inner: Schedule) -> None:
        self.inner = inner

    def factor(self, step: int) -> float:
        """The learning rate's factor."""
        return self.inner.factor(step) ** 2


@hookimpl
def lswt_components() -> list[type]:
    """Offer them."""
    return [Wrapped, Chain, Half, Squared]
