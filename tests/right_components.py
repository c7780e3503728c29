"""Components without a mistake that a careless check would blame."""

from __future__ import annotations

from typing import Any

import torch
from mutants.expected import CITATION
from mutants.mixers import Fading, Handing
from mutants.optimizers import SignMomentum
from mutants.stateful_layers import Gated, Shifted
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, FeedForward, Mixer, Norm, Optimizer


class Relu(FeedForward):
    """Has a kink."""

    name, citation = "relu", CITATION

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc1 = nn.Linear(dims.d_model, dims.d_ffn)
        self.fc2 = nn.Linear(dims.d_ffn, dims.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Switch(FeedForward):
    """Twelve experts, of which each token uses one: some get no token of a small batch."""

    name, citation = "switch", CITATION

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.router = nn.Linear(dims.d_model, 12)
        self.experts = nn.ModuleList(nn.Linear(dims.d_model, dims.d_model) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], -2)  # [B, T, E, M]
        index = chosen[..., None].expand(*x.shape[:-1], 1, x.shape[-1])
        return outputs.gather(-2, index).squeeze(-2) * weight


class StartsAtZero(FeedForward):
    """A factor of something that starts at zero, which has no gradient there."""

    name, citation = "starts-at-zero", CITATION

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.fc = nn.Linear(dims.d_model, dims.d_model)
        self.scale, self.gain = (nn.Parameter(torch.empty(1)) for _ in range(2))

    def reset_parameters(self) -> None:
        """The output starts as the layer's alone."""
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + x * self.scale * self.gain


class Kernel(FeedForward):
    """Parameters of three dimensions that are no matrices, and a stack that is none by its word."""

    name, citation, matrix_parameters = "kernel", CITATION, ()

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.convolution = nn.Conv1d(dims.d_model, dims.d_model, 1)
        self.distances = nn.Parameter(torch.empty(2, dims.d_model, dims.d_model))

    def reset_parameters(self) -> None:
        """Start everywhere at once."""
        nn.init.normal_(self.distances)
        nn.init.normal_(self.convolution.weight, std=0.3)
        nn.init.zeros_(self.convolution.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.mT).mT * torch.cdist(*self.distances).mean()


class Capped(Norm):
    """Keeps a cache, which grows with the longest input."""

    name, citation = "capped", CITATION
    longest = 0

    def forward(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, x.shape[-2])
        return x / (1 + x.square().mean(-1, keepdim=True)).sqrt()


class PreparesFirst(SignMomentum, Optimizer):
    """Its first step only takes a measure, as SOAP's does."""

    name = "prepares-first"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        before = [p.clone() for group in self.param_groups for p in group["params"]]
        is_first = not self.state
        super().step()
        if is_first:
            parameters = [p for group in self.param_groups for p in group["params"]]
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)


class Recurrent(Fading, Mixer):
    """The base of the mutants among mixers."""

    name = "recurrent"


class Balanced(Gated, FeedForward):
    """The base of the mutants among layers with losses."""

    name = "balanced"


class Tail(Shifted, FeedForward):
    """The base of the mutants among layers with state."""

    name = "tail"


class HandsUp(Handing, Mixer):
    """Reads what the first layer writes."""

    name = "hands-up"


COMPONENTS = [
    Relu,
    Switch,
    StartsAtZero,
    Kernel,
    Capped,
    PreparesFirst,
    Recurrent,
    Balanced,
    Tail,
    HandsUp,
]


@hookimpl
def lswt_components() -> list[type]:
    """All of them."""
    return COMPONENTS
