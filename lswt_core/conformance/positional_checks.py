"""Checks of positional encodings."""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, Subject
from lswt_core.conformance.tensors import EXACT, max_difference, random_normal
from lswt_core.interfaces import SlopeBias


@rule(
    "attention bias",
    ("positional",),
    why=(
        "keys come in blocks (KV cache, new segment), so a bias must follow from positions;"
        " backends use different forms of it, which must agree"
    ),
    fix=(
        "compute bias(q, q_positions, k_positions) from positions, never from indices; let dense()"
        " be what the slopes say"
    ),
    after=("shapes",),
)
def bias_follows_positions(subject: Subject) -> None:
    """The bias of a block of keys is that slice of the bias of all keys, in a shape that broadcasts
    to [B, H, T, N].
    """
    encoding = subject.module()
    q = random_normal(2, 3, DIMS.n_heads, DIMS.d_head)
    q_positions, k_positions = torch.arange(3), torch.arange(-5, 3)

    def dense_bias(first: int, last: int) -> Tensor:
        block = encoding.bias(q, q_positions, k_positions[first:last]).dense()  # type: ignore[operator]
        return torch.broadcast_to(block, (2, DIMS.n_heads, 3, last - first))

    bias = encoding.bias(q, q_positions, k_positions)  # type: ignore[operator]
    require(
        (bias is not None) == bool(encoding.has_bias),
        f"has_bias is {encoding.has_bias}, but bias() returns {bias!r}",
    )
    if bias is None:
        return
    full = dense_bias(0, 8)
    for first, last in ((0, 5), (5, 8)):
        error = max_difference(dense_bias(first, last), full[..., first:last])
        require(
            error <= EXACT,
            f"the bias of keys {first} to {last - 1} alone differs from theirs among all keys, by"
            f" {error:.2g}",
        )
    if isinstance(bias, SlopeBias):
        error = max_difference(bias.dense(), SlopeBias.dense(bias))
        require(error <= EXACT, f"dense() differs from what its slopes say, by {error:.2g}")
