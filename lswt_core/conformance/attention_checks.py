"""Checks of components on their own: attention backends against plain attention, layers and norms
position by position.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, Subject, distance
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    DenseBias,
    KVBlock,
    Unsupported,
)
from lswt_core.plugin_api.attention import attention_scores


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers."""
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def plain(parts: list[KVBlock]) -> Tensor:
    """One softmax over the union of parts, written out."""
    weights = torch.cat([attention_scores(part) for part in parts], dim=-1).softmax(-1)
    values = torch.cat([part.v for part in parts], dim=1).transpose(1, 2)
    return (weights.to(values.dtype) @ values).transpose(1, 2)


def situations(dtype: torch.dtype) -> Iterator[tuple[str, AttentionRequirements, list[KVBlock]]]:
    """Parts as models make them: the segment alone, with memory, with sinks, documents apart,
    biased.
    """
    B, T, N, H, D = 2, 5, 7, DIMS.n_heads, DIMS.d_head
    q, other = numbers(B, T, H, D, seed=1, dtype=dtype), numbers(B, T, H, D, seed=2, dtype=dtype)
    own, kept, sink = (
        (numbers(B, n, H, D, seed=n, dtype=dtype), numbers(B, n, H, D, seed=n + 9, dtype=dtype))
        for n in (T, N, 2)
    )
    first_visible = torch.tensor([[-9, -9, 2, 2, 2], [-3, -3, -3, -3, 4]])
    bias = (
        DenseBias(numbers(H, T, T, seed=6, dtype=dtype)),
        DenseBias(numbers(H, T, N, seed=7, dtype=dtype)),
    )
    need = AttentionRequirements("cpu", dtype, D)
    new, old = (
        KVBlock(q, *own, True, None, torch.arange(T)),
        KVBlock(q, *kept, False, None, torch.arange(-N, 0)),
    )
    yield "the new segment alone", need, [new]
    yield "remembered tokens", need, [old, new]
    yield "sinks", need, [KVBlock(other, *sink, False), old, new]
    yield (
        "documents apart",
        need._replace(has_mask=True),
        [old._replace(first_visible=first_visible), new._replace(first_visible=first_visible)],
    )
    yield (
        "a bias",
        need._replace(has_bias=True),
        [old._replace(bias=bias[1]), new._replace(bias=bias[0])],
    )


@rule(
    "oracle",
    ("attention",),
    why=(
        "a backend is a faster way to the same numbers; if they differ, an ablation compares"
        " kernels"
    ),
    mend=(
        "one softmax over all parts, scores times 1/sqrt(D); in the causal part key j is seen iff j"
        " <= i, in others every key"
    ),
    after=("meta", "randomness"),
)
def same_as_plain(subject: Subject) -> None:
    """Outputs and gradients are those of plain attention, or `require` refuses the situation."""
    backend, tried = subject.make(DIMS), 0
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        for name, need, parts in situations(dtype):
            if able(backend, need):
                tried += 1
                compare(backend, name, parts, tolerance)
    if not tried:
        raise SkipTest("it can do none of the situations on the CPU")


def able(backend: AttentionBackend, need: AttentionRequirements) -> bool:
    """Whether the backend says that it can do what is needed."""
    try:
        backend.require(need)
    except Unsupported:
        return False
    return True


def compare(backend: AttentionBackend, name: str, parts: list[KVBlock], tolerance: float) -> None:
    """Output and gradients against plain attention."""
    leaves = list({id(t): t for part in parts for t in (part.q, part.k, part.v)}.values())
    found = []
    for attend in (backend, plain):
        fresh = {id(leaf): leaf.clone().requires_grad_() for leaf in leaves}
        given = [
            part._replace(q=fresh[id(part.q)], k=fresh[id(part.k)], v=fresh[id(part.v)])
            for part in parts
        ]
        out = attend(given)
        found.append(
            (
                out.detach(),
                torch.autograd.grad(
                    (out * numbers(*out.shape, seed=8, dtype=out.dtype)).sum(), list(fresh.values())
                ),
            )
        )
    (out, gradients), (wanted, right) = found
    require(
        distance(out, wanted) <= tolerance,
        f"{name}, {out.dtype}: outputs are off by {distance(out, wanted):.2g}",
    )
    worst = max(distance(a, b) for a, b in zip(gradients, right, strict=True))
    require(worst <= 10 * tolerance, f"{name}, {out.dtype}: gradients are off by {worst:.2g}")


@rule(
    "low precision",
    ("attention",),
    why="in bfloat16 a backend may round otherwise than plain attention, but not worse",
    mend="accumulate scores, softmax and sums in float32",
    after=("oracle",),
)
def no_worse_than_plain(subject: Subject) -> None:
    """In bfloat16 the error against float64 is at most twice that of plain attention."""
    backend = subject.make(DIMS)
    need = AttentionRequirements("cpu", torch.bfloat16, DIMS.d_head)
    if not able(backend, need):
        raise SkipTest("it does not run in bfloat16 on the CPU")
    exact = [parts for _, _, parts in situations(torch.float64)][1]
    short = [parts for _, _, parts in situations(torch.bfloat16)][1]
    wanted = plain(exact)
    own, naive = (float((attend(short).double() - wanted).norm()) for attend in (backend, plain))
    require(
        own <= 2 * naive, f"the error in bfloat16 is {own:.3g}, that of plain attention {naive:.3g}"
    )


@rule(
    "position-wise",
    ("ffn", "norm", "qk_norm"),
    why=(
        "these layers treat every token alike; only attention lets tokens see each other, and only"
        " encodings know where they stand"
    ),
    mend="compute every token's output from that token's input alone",
    after=("shapes",),
)
def position_wise(subject: Subject) -> None:
    """Permuting or leaving out tokens permutes or leaves out outputs."""
    layer = subject.layer()
    tail = (DIMS.n_heads, DIMS.d_head) if subject.kind == "qk_norm" else (DIMS.d_model,)
    x, order = numbers(2, 6, *tail), torch.tensor([3, 0, 5, 1, 4, 2])
    whole = layer(x)
    require(whole.shape == x.shape, f"{list(x.shape)} becomes {list(whole.shape)}")
    moved = max(
        distance(layer(x[:, order]), whole[:, order]), distance(layer(x[:, 2:3]), whole[:, 2:3])
    )
    require(
        moved <= 1e-10, f"a token's output depends on other tokens or on its place, by {moved:.2g}"
    )
