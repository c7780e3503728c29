"""What attention backends share: the scores of a part, and parts joined into one set of queries,
keys and values for a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lswt_core.interfaces import KVBlock


class Joined(NamedTuple):
    """All parts as one, D' = D times the number of different query encodings."""

    q: Tensor  # [B, T, H, D']
    k: Tensor  # [B, N, H, D']
    v: Tensor  # [B, N, H, D'], zeros beyond D
    # broadcasts to [B, H, T, N]: bool (True = visible), or scores to add; None: nothing hidden or
    # added
    mask: Tensor | None


def distinct_queries(parts: Sequence[KVBlock]) -> tuple[list[Tensor], list[int]]:
    """The different queries of some parts, and by which of them each part is met."""
    queries: list[Tensor] = []
    met = []
    for part in parts:
        if not any(part.q is query for query in queries):
            queries.append(part.q)
        met.append(next(i for i, query in enumerate(queries) if query is part.q))
    return queries, met


def join(parts: Sequence[KVBlock]) -> Joined:
    """Put parts side by side, the causal one last.

    Parts whose queries are encoded differently (sinks, usually) get a slice of the head width each,
    queries stacked and keys zero in the other slices: q . k is unchanged and any kernel can run it,
    at the price of a wider head. Pass the original 1/sqrt(D) as the kernel's scale and drop the
    values beyond D afterwards.
    """
    parts = sorted(parts, key=lambda part: part.causal)
    queries, met = distinct_queries(parts)
    width = parts[0].q.shape[-1]
    spare = (len(queries) - 1) * width
    slots = [query * width for query in met]
    keys = [
        torch.nn.functional.pad(p.k, (slot, spare - slot)) if spare else p.k
        for p, slot in zip(parts, slots, strict=True)
    ]
    values = [torch.nn.functional.pad(p.v, (0, spare)) if spare else p.v for p in parts]
    return Joined(
        torch.cat(queries, -1), torch.cat(keys, 1), torch.cat(values, 1), join_masks(parts)
    )


Asked = TypeVar("Asked", bound=Callable[..., object])


def constant(function: Asked) -> Asked:
    """Let a compiled model ask this once, while it is compiled, and keep the answer:
    ``torch.compiler.assume_constant_result``, which imports the compiler, two seconds for whoever
    compiles nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def scale_of(q: Tensor) -> float:
    """1 / sqrt(D), of queries [..., D]."""
    return float(q.shape[-1] ** -0.5)


def scores(part: KVBlock) -> Tensor:
    """Scaled, biased and masked scores of one part in float32 at least, [B, H, T, N]."""
    q, k = part.q.transpose(1, 2), part.k.transpose(1, 2)
    found = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale_of(q)
    if part.bias is not None:
        found = found + part.bias.dense()
    visible = part.visible()
    return found if visible is None else found.masked_fill(~visible, -torch.inf)


def whole(parts: Sequence[KVBlock]) -> Tensor:
    """One softmax over the union of parts, [B, T, H, D], as it is defined: holds all scores, and
    copies neither keys nor values.
    """
    # [B, H, T, sum of N]
    weights = torch.cat([scores(part) for part in parts], -1).softmax(-1).to(parts[0].v.dtype)
    shares = weights.split([part.k.shape[1] for part in parts], dim=-1)
    products = [share @ part.v.transpose(1, 2) for share, part in zip(shares, parts, strict=True)]
    return torch.stack(products).sum(0).transpose(1, 2)


def join_masks(parts: Sequence[KVBlock]) -> Tensor | None:
    """One mask for parts side by side: bool where nothing is biased, else what to add to the
    scores.
    """
    seen = [part.visible() for part in parts]
    has_bias = any(part.bias is not None for part in parts)
    if not has_bias and all(mask is None for mask in seen):
        return None
    q = parts[0].q
    columns = []
    for part, mask in zip(parts, seen, strict=True):
        full = (1, 1, q.shape[1], part.k.shape[1])  # [B or 1, H or 1, T, N]
        mask = torch.ones(full, dtype=torch.bool, device=q.device) if mask is None else mask
        if has_bias:
            added = (
                torch.zeros(full, dtype=q.dtype, device=q.device)
                if part.bias is None
                else part.bias.dense().to(q.dtype)
            )
            mask = added.masked_fill(~mask, -torch.inf)
        columns.append(mask)
    shape = torch.broadcast_shapes(*(column.shape[:2] for column in columns))
    return torch.cat([column.expand(*shape, *column.shape[-2:]) for column in columns], dim=-1)
