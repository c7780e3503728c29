"""Attention block by block, and the log-sum-exp merge of the blocks' outputs: for backends whose
fused kernel returns the logsumexp.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lswt_core.interfaces import AttentionRequirements, KVBlock, SoftCap, Unsupported
from lswt_core.plugin_api.attention import (
    common_transform,
    distinct_queries,
    reference_attention,
    refuse_other_parts,
)

Gradients = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values
# of a probe, relative; float32 may be multiplied as TF32
LARGEST_ERROR = {torch.float64: 1e-10, torch.float32: 1e-2}
LARGEST_ERROR_HALF = 5e-2


class ProbeSize(NamedTuple):
    """Lengths of a probe's key blocks."""

    tokens: int
    cached: int
    sinks: int


# less than a tile of a kernel, and the lengths of the family's recipes
SHORT_PROBE, FAMILY_PROBE = ProbeSize(48, 80, 16), ProbeSize(2048, 2048, 16)
PROBE_SIZES = {"cpu": (SHORT_PROBE,), "cuda": (SHORT_PROBE, FAMILY_PROBE)}
PROBE_ROWS, PROBE_KV_HEADS = 2, 2
PROBE_CAP = 2.0  # of scores of size 1


class BackwardInputs(NamedTuple):
    """What the gradients of one block are computed from: its queries, keys and values, and the
    output, its gradient and the scores' logsumexp of all blocks together.
    """

    grad: Tensor  # [B, T, H, D]
    q: Tensor  # [B, T, H, D]
    k: Tensor  # [B, N, G, D]
    v: Tensor  # [B, N, G, D]
    out: Tensor  # [B, T, H, D]
    logsumexp: Tensor  # [B, H, T], in float32 or wider
    causal: bool  # whether the upper triangle of a square is masked


class Kernel(ABC):
    """A fused attention kernel. Shapes and ``causal`` are as in BackwardInputs; the scale is
    1/sqrt(D).
    """

    soft_cap: float = 0.0  # scores are capped by SoftCap(soft_cap); 0: they are not

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Return the attention output and the scores' logsumexp."""

    @abstractmethod
    def backward(self, inputs: BackwardInputs) -> Gradients:
        """Return the gradients of one block."""

    def query_gradient(self, inputs: BackwardInputs) -> Tensor:
        """Return the first of ``backward``'s gradients, for keys and values that need none. A
        kernel that can leave the other two out overrides this.
        """
        return self.backward(inputs)[0]


class MergedAttention(torch.autograd.Function):
    """Attention block by block; exact, since each block's backward pass is given the merged output
    and logsumexp.

    With lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i; the gradient of a block
    depends on the others only through out and lse (the algebra of FlashAttention's backward pass,
    Dao et al. 2022, appendix B.4).
    """

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, query_index: list[int], causal: list[bool], *tensors: Tensor
    ) -> Tensor:
        """``tensors``: every block's keys, every block's values, the distinct queries.
        ``query_index`` numbers each block's queries; ``causal`` marks the causal block.
        Returns [B, T, H, D].
        """
        blocks = zip(*BlockTensors.of(query_index, tensors), causal, strict=True)
        outputs = [kernel.forward(q, k, v, is_causal) for q, k, v, is_causal in blocks]
        out, logsumexp = outputs[0] if len(outputs) == 1 else merge_by_logsumexp(outputs)
        ctx.save_for_backward(out, logsumexp, *tensors)
        ctx.kernel, ctx.query_index, ctx.causal = kernel, query_index, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``tensors``, in their order. Blocks whose keys and values need
        none, as those of a memory, are left to ``Kernel.query_gradient``.
        """
        out, logsumexp, *tensors = ctx.saved_tensors
        n, wanted = len(ctx.causal), ctx.needs_input_grad[3:]
        needs_kv = [any(pair) for pair in zip(wanted[:n], wanted[n : 2 * n], strict=True)]
        parts = zip(*BlockTensors.of(ctx.query_index, tensors), ctx.causal, strict=True)
        blocks = [
            BackwardInputs(grad, q, k, v, out, logsumexp, causal) for q, k, v, causal in parts
        ]
        gradients = [
            ctx.kernel.backward(block) if needs else (ctx.kernel.query_gradient(block), None, None)
            for block, needs in zip(blocks, needs_kv, strict=True)
        ]
        dq = [
            reduce(
                torch.add,
                [g[0] for g, own in zip(gradients, ctx.query_index, strict=True) if own == index],
            )
            for index in range(1 + max(ctx.query_index))
        ]
        dk, dv = [g[1] for g in gradients], [g[2] for g in gradients]
        found = zip([*dk, *dv, *dq], wanted, strict=True)
        return None, None, None, *(g if is_wanted else None for g, is_wanted in found)


class BlockTensors(NamedTuple):
    """Queries, keys and values of every block."""

    q: Sequence[Tensor]
    k: Sequence[Tensor]
    v: Sequence[Tensor]

    @classmethod
    def of(cls, query_index: list[int], tensors: Sequence[Tensor]) -> BlockTensors:
        """From every block's keys, every block's values and the distinct queries."""
        n = len(query_index)
        queries = [tensors[2 * n + index] for index in query_index]
        return cls(queries, tensors[:n], tensors[n : 2 * n])


def merged_attention(kernel: Kernel, blocks: Sequence[KVBlock]) -> Tensor:
    """One softmax over blocks without bias or mask (but the causal one): -> [B, T, H, D]. Raises
    Unsupported for blocks with more than that, or another cap than the kernel's.
    """
    refuse_other_parts("merged by logsumexp", blocks, {"transform"})
    if soft_cap_of(blocks) != kernel.soft_cap:
        raise Unsupported(f"the kernel caps scores at {kernel.soft_cap or 'nothing'}")
    queries, query_index = distinct_queries(blocks)
    keys, values = [block.k for block in blocks], [block.v for block in blocks]
    causal = [block.causal for block in blocks]
    out: Tensor = MergedAttention.apply(kernel, query_index, causal, *keys, *values, *queries)
    return out


def soft_cap_of(blocks: Sequence[KVBlock]) -> float:
    """The cap of all blocks' scores, 0 if they are not capped. Raises Unsupported for a transform
    that is no SoftCap.
    """
    transform = common_transform(blocks)
    if transform is None:
        return 0.0
    if type(transform) is not SoftCap:
        raise Unsupported(
            f"fused kernels have no {type(transform).__name__}, SoftCap is the one transform of"
            " scores that they may have: use attention 'eager'"
        )
    return transform.cap


def merge_by_logsumexp(outputs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge the blocks' outputs [B, T, H, D] and logsumexp [B, H, T] into those of one softmax."""
    logsumexp = torch.stack([lse for _, lse in outputs]).logsumexp(0)
    weighted = [out * (lse - logsumexp).exp().transpose(1, 2)[..., None] for out, lse in outputs]
    return torch.stack(weighted).sum(0).to(outputs[0][0].dtype), logsumexp


KernelName = TypeVar("KernelName")


def first_verified(
    kernels: dict[KernelName, Kernel], need: AttentionRequirements
) -> tuple[KernelName | None, list[str]]:
    """Return the first kernel that computes correctly on the device, None if there is none, and
    the faults of those before it.
    """
    faults: list[str] = []
    for name, kernel in kernels.items():
        fault = find_fault(kernel, need)
        if fault is None:
            return name, faults
        faults.append(f"{name}: {fault}")
    return None, faults


def find_fault(kernel: Kernel, need: AttentionRequirements) -> str | None:
    """Compare a kernel with the reference on the device, with probes of every size; return what is
    wrong, None if nothing is.
    """
    allowed = LARGEST_ERROR.get(need.dtype, LARGEST_ERROR_HALF)
    for size in PROBE_SIZES.get(need.device, PROBE_SIZES["cpu"]):
        expected = run_probe(need, size, reference_attention)
        try:
            actual = run_probe(need, size, lambda blocks: merged_attention(kernel, blocks))
            fault = first_difference(actual, expected, allowed)
        # the kernel, or the device, refuses; each package has errors of its own
        except Exception as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
        if fault is not None:
            return f"{fault} in a trial"
    return None


def first_difference(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float
) -> str | None:
    """Name the first tensor whose relative error, in the Euclidean norm, is over ``allowed`` or
    NaN.
    """
    for name, tensor in expected.items():
        error = float((actual[name] - tensor).norm() / tensor.norm())
        if not error <= allowed:
            return f"its {name} is off by {error:.1g}"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def run_probe(
    need: AttentionRequirements,
    size: ProbeSize,
    attention: Callable[[Sequence[KVBlock]], Tensor],
) -> dict[str, Tensor]:
    """Output and gradients of an attention function on a probe, in float32 or wider."""
    blocks, leaves, grad = build_probe(need, size)
    with torch.autocast(need.device, enabled=False):
        out = attention(blocks)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    tensors = {"output": out}
    for name, gradient in zip(leaves, gradients, strict=True):
        tensors[f"gradient of {name}"] = gradient
    return {
        name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in tensors.items()
    }


def build_probe(
    need: AttentionRequirements, size: ProbeSize
) -> tuple[list[KVBlock], dict[str, Tensor], Tensor]:
    """Key blocks, leaf tensors to differentiate by, and a gradient of the output: the same random
    numbers at every call, laid out in memory as a model's are.

    Sinks are parameters [N, G, D] expanded over the rows, with queries of their own. These, and
    all values, are slices of a fused product [B, T, M + 2 G D]; rotated queries and keys are dense.
    """
    generator = torch.Generator().manual_seed(0)
    n_kv, n_heads = PROBE_KV_HEADS, PROBE_KV_HEADS * need.queries_per_kv

    def randn(*shape: int) -> Tensor:
        values = torch.randn(*shape, need.d_head, generator=generator, device="cpu")
        return values.to(need.device, need.dtype)

    qkv = randn(PROBE_ROWS, size.tokens, n_heads + 2 * n_kv).requires_grad_()
    sink_q, v = qkv[:, :, :n_heads], qkv[:, :, -n_kv:]
    q = randn(PROBE_ROWS, size.tokens, n_heads).requires_grad_()
    k = randn(PROBE_ROWS, size.tokens, n_kv).requires_grad_()
    sink_k, sink_v = (randn(size.sinks, n_kv).requires_grad_() for _ in range(2))
    cached_k = randn(PROBE_ROWS, size.cached, n_kv)
    cached_v = randn(PROBE_ROWS, size.cached, n_heads + 2 * n_kv)[:, :, -n_kv:]
    expanded_k, expanded_v = (sink.expand(PROBE_ROWS, -1, -1, -1) for sink in (sink_k, sink_v))
    cap = SoftCap(PROBE_CAP) if need.has_transform else None
    blocks = [
        KVBlock(sink_q, expanded_k, expanded_v, causal=False, transform=cap),
        KVBlock(q, cached_k, cached_v, causal=False, transform=cap),
        KVBlock(q, k, v, causal=True, transform=cap),
    ]
    leaves = {
        "queries": q,
        "sinks' queries": sink_q,
        "keys": k,
        "values": v,
        "sinks' keys": sink_k,
        "sinks' values": sink_v,
    }
    return blocks, leaves, randn(PROBE_ROWS, size.tokens, n_heads)
