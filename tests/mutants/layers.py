"""Feed-forward layers and norms, each wrong in one way."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from lswt_core.interfaces import Dims, FeedForward, Norm, QKNorm
from mutants.meant import CITED, meant


class Layer(FeedForward):
    """A right layer for mutants to spoil."""

    citation = CITED

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc = nn.Linear(dims.d_model, dims.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


@meant("documentation")
class Silent(Layer, FeedForward):
    name = "silent"


@meant("citation")
class Unquotable(Layer, FeedForward):
    """Says nothing of where it comes from."""

    name, citation = "unquotable", ""


@meant("options")
class Untyped(Layer, FeedForward):
    """Its option has a value that its type forbids."""

    name = "untyped"

    def __init__(self, dims: Dims, *, scale: int = 0.5) -> None:  # type: ignore[assignment]
        super().__init__(dims)


@meant("meta")
class Unfilled(Layer, FeedForward):
    """A buffer that is computed when it is built, where there is no memory, and never again."""

    name = "unfilled"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("table", torch.ones(dims.d_model), persistent=False)

    def reset_parameters(self) -> None:
        """Forgets the table."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.table.nan_to_num(1.0).sign()


@meant("initialisation")
class Careless(Layer, FeedForward):
    """Its table is drawn from Python's generator."""

    name = "careless"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.scale = nn.Parameter(torch.empty(dims.d_model))

    def reset_parameters(self) -> None:
        """Draw from a generator that nobody seeds."""
        nn.init.constant_(self.scale, 1 + random.random())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@meant("start")
class Hasty(Layer, FeedForward):
    """Means to start at nothing, and says so in its constructor, where there is no memory."""

    name = "hasty"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        nn.init.zeros_(self.fc.weight)


@meant("start")
class Replacing(Layer, FeedForward):
    """The same by a parameter of its own making."""

    name = "replacing"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc.weight = nn.Parameter(torch.eye(dims.d_model))


@meant("state dict")
class Forgetful(Layer, FeedForward):
    """A random table that no checkpoint holds."""

    name = "forgetful"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("table", torch.empty(dims.d_model), persistent=False)

    def reset_parameters(self) -> None:
        """Draw it."""
        self.table.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.table


@meant("randomness")
class Noisy(Layer, FeedForward):
    """Draws a number in every pass, and does not even use it."""

    name = "noisy"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.rand(()).to(x)


@meant("shapes")
class Widening(Layer, FeedForward):
    """Gives float64, whatever it is given."""

    name = "widening"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


@meant("position-wise")
class Clairvoyant(Layer, FeedForward):
    """Adds the mean over all tokens, later ones included."""

    name = "clairvoyant"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(1, keepdim=True)


@meant("position-wise")
class Counting(Norm):
    """Scales tokens by their place."""

    name, citation = "counting", CITED

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)
        return x * (1 + 0.1 * places)[:, None]


@meant("rows")
class Crowded(Layer, FeedForward):
    """Subtracts the mean over rows."""

    name = "crowded"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5 * x.mean(0, keepdim=True))


@meant("gradcheck")
class Short(QKNorm):
    """Takes a detour over float32."""

    name, citation = "short", CITED

    def forward(self, x: Tensor) -> Tensor:
        return x.float().tanh().to(x.dtype)


@meant("gradients")
class Idle(Layer, FeedForward):
    """Has a parameter that is of no use."""

    name = "idle"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.spare = nn.Parameter(torch.empty(3))

    def reset_parameters(self) -> None:
        """Fill it all the same."""
        nn.init.ones_(self.spare)


@meant("bfloat16")
class Cancelling(Layer, FeedForward):
    """Adds a number that bfloat16 cannot hold beside small ones."""

    name = "cancelling"

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) + 300.0) - 300.0


@meant("compile")
class Looking(Layer, FeedForward):
    """Looks at a value."""

    name = "looking"

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found if found.abs().max().item() < 1e9 else found * 0
