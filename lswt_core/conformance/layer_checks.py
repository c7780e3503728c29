"""Checks of feed-forward layers and norms."""

from __future__ import annotations

from unittest import SkipTest

import torch

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, Subject
from lswt_core.conformance.tensors import EXACT, max_difference, random_normal


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
    layer = subject.module()
    if getattr(layer, "reach", 0) != 0:
        raise SkipTest("it keeps state of earlier tokens (reach)")
    width = (DIMS.n_heads, DIMS.d_head) if subject.kind == "qk_norm" else (DIMS.d_model,)
    x = random_normal(2, 6, *width)
    permutation = torch.tensor([3, 0, 5, 1, 4, 2])
    out = subject.apply(layer, x)
    require(out.shape == x.shape, f"an input {list(x.shape)} gives an output {list(out.shape)}")
    error = max(
        max_difference(subject.apply(layer, x[:, permutation]), out[:, permutation]),
        max_difference(subject.apply(layer, x[:, 2:3]), out[:, 2:3]),
    )
    require(
        error <= EXACT,
        f"the output of a token depends on other tokens or its index, by {error:.2g}",
    )
