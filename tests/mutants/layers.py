"""Feed-forward layers and norms with one mistake each."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from lswt_core.interfaces import Dims, FeedForward, Norm, QKNorm
from mutants.expected import CITATION, caught_by


class TanhLayer(FeedForward):
    """A correct layer, the base of mutants."""

    citation = CITATION

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc = nn.Linear(dims.d_model, dims.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


@caught_by("documentation")
class NoDocstring(TanhLayer, FeedForward):
    name = "no-docstring"


@caught_by("citation")
class NoCitation(TanhLayer, FeedForward):
    """Has no citation."""

    name, citation = "no-citation", ""


@caught_by("options")
class InvalidDefault(TanhLayer, FeedForward):
    """The default of its option violates the annotation."""

    name = "invalid-default"

    def __init__(self, dims: Dims, *, scale: int = 0.5) -> None:  # type: ignore[assignment]
        super().__init__(dims)


@caught_by("meta device")
class UnfilledBuffer(TanhLayer, FeedForward):
    """Fills a buffer in the constructor alone, which runs on the meta device."""

    name = "unfilled-buffer"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("table", torch.ones(dims.d_model), persistent=False)

    def reset_parameters(self) -> None:
        """Does not fill the table."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.table.nan_to_num(1.0).sign()


@caught_by("reproducible initialisation")
class PythonRandomness(TanhLayer, FeedForward):
    """Draws initial values from Python's global generator."""

    name = "python-randomness"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.scale = nn.Parameter(torch.empty(dims.d_model))

    def reset_parameters(self) -> None:
        """Draw from a generator that the core does not seed."""
        nn.init.constant_(self.scale, 1 + random.random())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Stacked(TanhLayer, FeedForward):
    """The base of mutants with two matrices in one parameter, whose outputs are added."""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.experts = nn.Parameter(torch.empty(2, dims.d_model, dims.d_model))

    def reset_parameters(self) -> None:
        """Start like a linear layer."""
        nn.init.normal_(self.experts, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.einsum("btm,enm->btn", x, self.experts).tanh()


@caught_by("matrix parameters")
class UndeclaredMatrices(Stacked, FeedForward):
    """Does not say that its stack is one of matrices."""

    name = "undeclared-matrices"


@caught_by("matrix parameters")
class DeclaredVector(TanhLayer, FeedForward):
    """Says that a vector is a matrix."""

    name, matrix_parameters = "declared-vector", ("scale",)

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.scale = nn.Parameter(torch.empty(dims.d_model))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.scale)


@caught_by("initial values")
class ZeroedInConstructor(TanhLayer, FeedForward):
    """Sets initial values in its constructor, which runs on the meta device."""

    name = "zeroed-in-constructor"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        nn.init.zeros_(self.fc.weight)


@caught_by("initial values")
class ReplacedInConstructor(TanhLayer, FeedForward):
    """Replaces a parameter in its constructor, which runs on the meta device."""

    name = "replaced-in-constructor"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc.weight = nn.Parameter(torch.eye(dims.d_model))


@caught_by("state dict")
class UnsavedTable(TanhLayer, FeedForward):
    """Has a random table that is not in the state dict."""

    name = "unsaved-table"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("table", torch.empty(dims.d_model), persistent=False)

    def reset_parameters(self) -> None:
        """Draw it."""
        self.table.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.table


@caught_by("randomness")
class DrawsInForward(TanhLayer, FeedForward):
    """Draws a random number in every forward pass, without using it."""

    name = "draws-in-forward"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * torch.rand(()).to(x)


@caught_by("shapes")
class ReturnsFloat64(TanhLayer, FeedForward):
    """Returns float64 for every input dtype."""

    name = "returns-float64"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


@caught_by("position-wise")
class MeanOverTokens(TanhLayer, FeedForward):
    """Adds the mean over all tokens, later ones included."""

    name = "mean-over-tokens"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(1, keepdim=True)


@caught_by("position-wise")
class ScaledByIndex(Norm):
    """Scales tokens by their index."""

    name, citation = "scaled-by-index", CITATION

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)
        return x * (1 + 0.1 * index)[:, None]


@caught_by("row independence")
class MeanOverRows(TanhLayer, FeedForward):
    """Subtracts the mean over the batch."""

    name = "mean-over-rows"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5 * x.mean(0, keepdim=True))


@caught_by("gradcheck")
class ThroughFloat32(QKNorm):
    """Computes in float32 for float64 inputs."""

    name, citation = "through-float32", CITATION

    def forward(self, x: Tensor) -> Tensor:
        return x.float().tanh().to(x.dtype)


@caught_by("gradients")
class UnusedParameter(TanhLayer, FeedForward):
    """Has a parameter that forward does not use."""

    name = "unused-parameter"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.spare = nn.Parameter(torch.empty(3))

    def reset_parameters(self) -> None:
        """Fill the unused parameter."""
        nn.init.ones_(self.spare)


@caught_by("bfloat16")
class Cancelling(TanhLayer, FeedForward):
    """Adds and subtracts a constant too large for bfloat16."""

    name = "cancelling"

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x) + 300.0) - 300.0


@caught_by("compile")
class BranchesOnValues(TanhLayer, FeedForward):
    """Branches on the value of a tensor."""

    name = "branches-on-values"

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if out.abs().max().item() < 1e9:
            return out
        return out * 0


@caught_by("interface")
class NoForward(Norm):
    """Has no forward."""

    name, citation = "no-forward", CITATION


@caught_by("interface")
class TakesMore(Norm):
    """Its forward takes an argument that nobody passes."""

    name, citation = "takes-more", CITATION

    def forward(self, x: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        return x / (1 + eps)


@caught_by("meta device")
class PlainConstant(TanhLayer, FeedForward):
    """Keeps a constant as a plain attribute."""

    name = "plain-constant"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.scale = torch.linspace(0.5, 1, dims.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@caught_by("meta device")
class ReadsConstant(TanhLayer, FeedForward):
    """Reads a tensor's values in its constructor."""

    name = "reads-constant"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.scale = torch.linspace(0.5, 1, dims.d_model).mean().item()


@caught_by("meta device")
class UnfilledIndex(TanhLayer, FeedForward):
    """Fills an integer buffer in the constructor alone."""

    name = "unfilled-index"

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.register_buffer("order", torch.arange(dims.d_model), persistent=False)

    def reset_parameters(self) -> None:
        """Does not fill the index."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., self.order]


@caught_by("in-place writes")
class ScalesInPlace(TanhLayer, FeedForward):
    """Scales its input in place."""

    name = "scales-in-place"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9))


@caught_by("position-wise")
class BeginsLate(TanhLayer, FeedForward):
    """Beyond 100 tokens, adds the mean over all of them."""

    name = "begins-late"

    def forward(self, x: Tensor) -> Tensor:
        late = x.mean(1, keepdim=True) if x.shape[1] > 100 else 0
        return super().forward(x + late)


@caught_by("zeros")
class NoEps(Norm):
    """Divides by a norm that may be zero."""

    name, citation = "no-eps", CITATION

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()
