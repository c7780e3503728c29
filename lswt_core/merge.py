"""Attention part by part, merged by the logarithms of their sums: what backends share whose kernel tells them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lswt_core.interfaces import Need, Part
from lswt_core.parts import distinct_queries, whole

Gradients = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values
LARGEST_ERROR = {torch.float64: 1e-10, torch.float32: 1e-2}  # of a trial, relative; float32 may be multiplied as TF32
LARGEST_ERROR_OF_HALVES = 5e-2


class Kernel(ABC):
    """A fused attention kernel. Tensors are [B, T or N, H, D], logarithms of sums [B, H, T] and in float32 at least; scale 1/sqrt(D)."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """The weighted sum of values and the logarithm of the sum of exp(scores). ``causal`` hides the upper triangle of a square."""

    @abstractmethod
    def differentiate(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, total: Tensor, causal: bool) -> Gradients:
        """The gradients of a part, from the output and sums of all parts together."""


class Merged(torch.autograd.Function):
    """Attention part by part; exact, since each part's backward pass is given the merged output and sum.

    With total = log sum_i exp(sum_i), out = sum_i exp(sum_i - total) out_i; the gradient of a part depends on the others only
    through out and total (the algebra of FlashAttention's backward, Dao et al. 2022, appendix B.4).
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, met: list[int], causal: list[bool], *tensors: Tensor) -> Tensor:
        """All keys, all values, all different queries; ``met`` says which queries meet each part, ``causal`` whether it is the new
        segment's square: -> [B, T, H, D].
        """
        given = PartTensors.of(met, tensors)
        found = [kernel.attend(q, k, v, square) for q, k, v, square in zip(*given, causal, strict=True)]
        out, total = found[0] if len(found) == 1 else merge(found)
        ctx.save_for_backward(out, total, *tensors)
        ctx.kernel, ctx.met, ctx.causal = kernel, met, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of keys, values and queries."""
        out, total, *tensors = ctx.saved_tensors
        parts = zip(*PartTensors.of(ctx.met, tensors), ctx.causal, strict=True)
        found = [ctx.kernel.differentiate(grad, q, k, v, out, total, square) for q, k, v, square in parts]
        by_query = [[of_q for at, (of_q, _, _) in zip(ctx.met, found, strict=True) if at == query] for query in range(1 + max(ctx.met))]
        of_queries = (reduce(torch.add, gradients) for gradients in by_query)
        every = (*(k for _, k, _ in found), *(v for _, _, v in found), *of_queries)
        return (None, None, None, *(g if want else None for g, want in zip(every, ctx.needs_input_grad[3:], strict=True)))


class PartTensors(NamedTuple):
    """What the parts are made of, in their order."""

    q: Sequence[Tensor]
    k: Sequence[Tensor]
    v: Sequence[Tensor]

    @classmethod
    def of(cls, met: list[int], tensors: Sequence[Tensor]) -> PartTensors:
        """From all keys, all values, all different queries."""
        n = len(met)
        return cls([tensors[2 * n + query] for query in met], tensors[:n], tensors[n : 2 * n])


def attend(kernel: Kernel, parts: Sequence[Part]) -> Tensor:
    """One softmax over the union of parts that neither are biased nor hide keys: -> [B, T, H, D]."""
    queries, met = distinct_queries(parts)
    tensors = [*(part.k for part in parts), *(part.v for part in parts), *queries]
    out: Tensor = Merged.apply(kernel, met, [part.causal for part in parts], *tensors)
    return out


def merge(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, D] and logarithms of sums [B, H, T] of parts as those of the whole."""
    total = torch.stack([own for _, own in found]).logsumexp(0)
    shares = [out * (own - total).exp().transpose(1, 2)[..., None] for out, own in found]
    return torch.stack(shares).sum(0).to(found[0][0].dtype), total


Name = TypeVar("Name")


def first_sound(kernels: dict[Name, Kernel], need: Need) -> tuple[Name | None, list[str]]:
    """The first of some kernels that computes on the device what it should, and what is wrong with those before it."""
    faults: list[str] = []
    for name, kernel in kernels.items():
        fault = fault_of(kernel, need)
        if fault is None:
            return name, faults
        faults.append(f"{name}: {fault}")
    return None, faults


def fault_of(kernel: Kernel, need: Need) -> str | None:
    """What is wrong with a kernel on a device, by a small trial against the formula; None: nothing."""
    try:
        found = trial(need, lambda parts: attend(kernel, parts))
        wanted = trial(need, whole)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # the kernel, or the device, refuses
        return (str(error).splitlines() or [type(error).__name__])[0]
    allowed = LARGEST_ERROR.get(need.dtype, LARGEST_ERROR_OF_HALVES)
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    return None if worst <= allowed else f"it is off by {worst:.1g} in a trial"


@torch.inference_mode(False)
@torch.enable_grad()
def trial(need: Need, function: Any) -> list[Tensor]:
    """Output and gradients of a small question with a sink, remembered keys and new ones, in float32 at least."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: int, learned: bool = True) -> Tensor:
        numbers = torch.randn(2, size, 2, need.d_head, generator=generator, device="cpu")
        return numbers.to(need.device, need.dtype).requires_grad_(learned)

    q, own, k, v = draw(48), draw(48), draw(48), draw(48)
    parts = [
        Part(own, draw(5), draw(5), causal=False),
        Part(q, draw(80, False), draw(80, False), causal=False),
        Part(q, k, v, causal=True),
    ]
    leaves = [q, own, k, v, parts[0].k, parts[0].v]
    with torch.autocast(need.device, enabled=False):
        out = function(parts)
        grads = torch.autograd.grad(out, leaves, draw(48, False))
    return [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (out, *grads)]
