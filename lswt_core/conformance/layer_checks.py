"""Checks of feed-forward layers and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, Subject
from lswt_core.conformance.tensors import EXACT, max_difference, random_normal
from lswt_core.interfaces import LayerContext

MANY_TOKENS = 300  # some mistakes begin at a length


@rule(
    "position-wise",
    ("ffn", "norm", "qk_norm"),
    why=(
        "these layers treat every token alike; only attention mixes tokens, and only positional"
        " encodings depend on positions"
    ),
    fix="compute the output of every token from the input of that token alone",
    after=("shapes",),
)
def is_position_wise(subject: Subject) -> None:
    """Permuting or dropping tokens permutes or drops outputs."""
    width = (DIMS.n_heads, DIMS.d_head) if subject.kind == "qk_norm" else (DIMS.d_model,)
    apply = position_wise_function(subject)
    x = random_normal(2, MANY_TOKENS, *width)
    permutation = torch.randperm(MANY_TOKENS, generator=torch.Generator().manual_seed(3))
    out = apply(x)
    require(out.shape == x.shape, f"an input {list(x.shape)} gives an output {list(out.shape)}")
    error = max(
        max_difference(apply(x[:, permutation]), out[:, permutation]),
        max_difference(apply(x[:, 2:3]), out[:, 2:3]),
    )
    require(
        error <= EXACT,
        f"the output of a token depends on other tokens or its index, by {error:.2g}",
    )


def position_wise_function(subject: Subject) -> Callable[[Tensor], Tensor]:
    """The layer as a function of its input. Raises SkipTest for one that looks at other tokens, or
    at more than its input.
    """
    layer: Any = subject.module()
    if not subject.is_stateful_ffn:
        return lambda x: layer(x)
    if layer.reach != 0 or layer.reads:
        raise SkipTest("it keeps state, or reads the context")
    positional = subject.reference("positional")(DIMS)

    def apply(x: Tensor) -> Tensor:
        context = LayerContext(torch.arange(x.shape[1]), None, positional, {})
        out: Tensor = layer(x, None, context).x
        return out

    return apply


@rule(
    "zeros",
    ("norm", "qk_norm"),
    why="hidden states of padding, or behind weights that start at zero, are zero",
    fix="add an eps within the root or the division",
    after=("position-wise",),
)
def norms_of_zeros_are_finite(subject: Subject) -> None:
    """Zeros have finite outputs and gradients, in float64 and float32."""
    width = (DIMS.n_heads, DIMS.d_head) if subject.kind == "qk_norm" else (DIMS.d_model,)
    for dtype in (torch.float64, torch.float32):
        x = torch.zeros(1, 2, *width, dtype=dtype, requires_grad=True)
        out = subject.module(dtype=dtype)(x)
        require(out.isfinite().all(), "zeros have outputs that are not finite")
        (gradient,) = torch.autograd.grad(out.sum(), x)
        require(gradient.isfinite().all(), "zeros have gradients that are not finite")
