"""Attention part by part, merged by the logarithms of their sums: what backends share whose kernel
tells them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lswt_core.interfaces import AttentionRequirements, KVBlock
from lswt_core.plugin_api.attention import distinct_queries, whole

Gradients = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values
# of a trial, relative; float32 may be multiplied as TF32
LARGEST_ERROR = {torch.float64: 1e-10, torch.float32: 1e-2}
LARGEST_ERROR_OF_HALVES = 5e-2


class TrialSize(NamedTuple):
    """Lengths of a trial's parts."""

    tokens: int
    remembered: int
    sinks: int


# Lengths of a trial: less than a tile of a kernel, and those of the family's recipes.
SHORT, FAMILY = TrialSize(48, 80, 16), TrialSize(2048, 2048, 16)
TRIAL_SIZES = {"cpu": (SHORT,), "cuda": (SHORT, FAMILY)}
TRIAL_ROWS, TRIAL_HEADS = 2, 2


class Kernel(ABC):
    """A fused attention kernel. Tensors are [B, T or N, H, D], logarithms of sums [B, H, T] and in
    float32 at least; scale 1/sqrt(D).
    """

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """The weighted sum of values and the logarithm of the sum of exp(scores). ``causal`` hides
        the upper triangle of a square.
        """

    @abstractmethod
    def differentiate(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        total: Tensor,
        causal: bool,
    ) -> Gradients:
        """The gradients of a part, from the output and sums of all parts together."""


class Merged(torch.autograd.Function):
    """Attention part by part; exact, since each part's backward pass is given the merged output and
    sum.

    With total = log sum_i exp(sum_i), out = sum_i exp(sum_i - total) out_i; the gradient of a part
    depends on the others only through out and total (the algebra of FlashAttention's backward, Dao
    et al. 2022, appendix B.4).
    """

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, met: list[int], causal: list[bool], *tensors: Tensor
    ) -> Tensor:
        """All keys, all values, all different queries; ``met`` says which queries meet each part,
        ``causal`` whether it is the new segment's square: -> [B, T, H, D].
        """
        given = PartTensors.of(met, tensors)
        found = [
            kernel.attend(q, k, v, square) for q, k, v, square in zip(*given, causal, strict=True)
        ]
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
        found = [
            ctx.kernel.differentiate(grad, q, k, v, out, total, square) for q, k, v, square in parts
        ]
        by_query = [
            [of_q for at, (of_q, _, _) in zip(ctx.met, found, strict=True) if at == query]
            for query in range(1 + max(ctx.met))
        ]
        of_queries = (reduce(torch.add, gradients) for gradients in by_query)
        every = (*(k for _, k, _ in found), *(v for _, _, v in found), *of_queries)
        return (
            None,
            None,
            None,
            *(g if want else None for g, want in zip(every, ctx.needs_input_grad[3:], strict=True)),
        )


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


def attend(kernel: Kernel, parts: Sequence[KVBlock]) -> Tensor:
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


def first_verified(
    kernels: dict[Name, Kernel], need: AttentionRequirements
) -> tuple[Name | None, list[str]]:
    """The first of some kernels that computes on the device what it should, and what is wrong with
    those before it.
    """
    faults: list[str] = []
    for name, kernel in kernels.items():
        fault = fault_of(kernel, need)
        if fault is None:
            return name, faults
        faults.append(f"{name}: {fault}")
    return None, faults


def fault_of(kernel: Kernel, need: AttentionRequirements) -> str | None:
    """What is wrong with a kernel on a device, by a trial of every size against the formula; None:
    nothing.
    """
    for size in TRIAL_SIZES.get(need.device, TRIAL_SIZES["cpu"]):
        wanted = probe(need, size, whole)
        try:
            found = probe(need, size, lambda parts: attend(kernel, parts))
            fault = difference(
                found, wanted, LARGEST_ERROR.get(need.dtype, LARGEST_ERROR_OF_HALVES)
            )
        # the kernel, or the device, refuses; each package has errors of its own
        except Exception as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
        if fault is not None:
            return f"{fault} in a trial"
    return None


def difference(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], allowed: float
) -> str | None:
    """The first tensor whose relative error in the norm is not within what is allowed; a NaN never
    is.
    """
    for name, tensor in wanted.items():
        error = float((found[name] - tensor).norm() / tensor.norm())
        if not error <= allowed:
            return f"its {name} is off by {error:.1g}"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def probe(
    need: AttentionRequirements, size: TrialSize, function: Callable[[Sequence[KVBlock]], Tensor]
) -> dict[str, Tensor]:
    """Output and gradients of a question laid out in memory as a model's are, in float32 at least."""
    parts, leaves, grad = question(need, size)
    with torch.autocast(need.device, enabled=False):
        out = function(parts)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    named = {"output": out} | {
        f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)
    }
    return {
        name: t.detach().to(torch.promote_types(t.dtype, torch.float32))
        for name, t in named.items()
    }


def question(
    need: AttentionRequirements, size: TrialSize
) -> tuple[list[KVBlock], dict[str, Tensor], Tensor]:
    """Parts, what is differentiated by, and the gradient of the output: random numbers, the same at
    every call.

    Sinks are parameters [N, H, D] expanded over the rows and met by queries of their own. These,
    and all values, are slices of a fused product [B, T, 3 M]; rotated queries and keys are dense.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        numbers = torch.randn(*shape, TRIAL_HEADS, need.d_head, generator=generator, device="cpu")
        return numbers.to(need.device, need.dtype)

    product = draw(TRIAL_ROWS, size.tokens, 3).requires_grad_()  # of queries, keys and values
    own, v = product[:, :, 0], product[:, :, 2]
    q, k = (draw(TRIAL_ROWS, size.tokens).requires_grad_() for _ in range(2))
    sink_k, sink_v = (draw(size.sinks).requires_grad_() for _ in range(2))
    old_k, old_v = draw(TRIAL_ROWS, size.remembered), draw(TRIAL_ROWS, size.remembered, 3)[:, :, 2]
    sinks = [sink.expand(TRIAL_ROWS, -1, -1, -1) for sink in (sink_k, sink_v)]
    parts = [
        KVBlock(own, sinks[0], sinks[1], causal=False),
        KVBlock(q, old_k, old_v, causal=False),
        KVBlock(q, k, v, causal=True),
    ]
    leaves = {
        "queries": q,
        "sinks' queries": own,
        "keys": k,
        "values": v,
        "sinks' keys": sink_k,
        "sinks' values": sink_v,
    }
    return parts, leaves, draw(TRIAL_ROWS, size.tokens)
