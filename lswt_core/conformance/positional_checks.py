"""Checks of positional encodings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, Subject
from lswt_core.conformance.tensors import EXACT, max_difference, random_normal
from lswt_core.interfaces import DifferenceBias, KeyValue, PositionalEncoding, SlopeBias


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
    if type(encoding).block_biases is not PositionalEncoding.block_biases:  # type: ignore[attr-defined]
        blocks_do_not_matter(encoding)
        return
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


def blocks_do_not_matter(encoding: nn.Module) -> None:
    """Require that ``block_biases`` gives the same biases however earlier keys are cut into blocks,
    for parameters that are not at their initial values, which may be 0.
    """
    require(encoding.has_bias, "block_biases() is there, but has_bias is False")
    with torch.no_grad():
        for seed, parameter in enumerate(encoding.parameters()):
            parameter.copy_(random_normal(*parameter.shape, seed=seed))
    new = 3
    full = dense_block_biases(encoding, [5, new])
    for sizes in ([2, 3, new], [1, 1, 3, new]):
        error = max_difference(dense_block_biases(encoding, sizes), full)
        require(
            error <= EXACT,
            f"the biases of 8 keys differ if they come in blocks of {sizes}, by {error:.2g}",
        )
    error = max_difference(dense_block_biases(encoding, [new], skipped=5), full[..., -new:])
    require(
        error <= EXACT,
        f"the biases of the segment's own keys depend on whether there are others, by {error:.2g}",
    )


def dense_block_biases(encoding: nn.Module, sizes: list[int], skipped: int = 0) -> Tensor:
    """The biases of keys in blocks of some sizes, [B, H, T, N]; the last block is the segment's
    own, and ``skipped`` keys before them all are left out.
    """
    n_keys, rows = skipped + sum(sizes), 2
    k = random_normal(rows, n_keys, DIMS.n_heads, DIMS.d_head, seed=1)
    features = encoding.features(random_normal(rows, n_keys, DIMS.d_model, seed=2))  # type: ignore[operator]
    positions = torch.arange(n_keys) - (n_keys - sizes[-1])
    keys, first = [], skipped
    for size in sizes:
        part = slice(first, first + size)
        own = None if features is None else features[:, part]
        keys.append(KeyValue(k[:, part], k[:, part], positions[part], features=own))
        first += size
    q = random_normal(rows, sizes[-1], DIMS.n_heads, DIMS.d_head, seed=3)
    biases = encoding.block_biases(q, keys, positions[-sizes[-1] :])  # type: ignore[operator]
    for bias in biases:
        if isinstance(bias, DifferenceBias):
            error = max_difference(bias.dense(), DifferenceBias.dense(bias))
            require(error <= EXACT, f"dense() differs from what its terms say, by {error:.2g}")
    shape = (rows, DIMS.n_heads, sizes[-1])
    return torch.cat(
        [
            torch.zeros(*shape, size, dtype=q.dtype)
            if bias is None
            else bias.dense().expand(*shape, size)
            for bias, size in zip(biases, sizes, strict=True)
        ],
        dim=-1,
    )
