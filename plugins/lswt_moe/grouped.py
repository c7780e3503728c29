"""Linear layers of many experts, each applied to its own rows: one operation for torch.compile, the
meta device and FLOP counters, however the rows are spread.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import register_flop_formula

from lswt_core.plugin_api.operators import operator_name

ALIGNMENT = 8  # numbers: widths that the fused kernel takes are multiples of it


def grouped_linear(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """``weight[expert[n]] @ x[n]`` for rows x [N, I], weights [E, O, I] and experts [N] in
    ascending order: -> [N, O].
    """
    return LINEAR(x, weight, expert)


def grouped_outer(y: Tensor, x: Tensor, expert: Tensor, n_experts: int) -> Tensor:
    """The sum of the outer products of y [N, O] and x [N, I] over the rows of each expert:
    -> [E, O, I].
    """
    return OUTER(y, x, expert, n_experts)


def compute_linear(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """``grouped_linear`` on a device."""
    if has_fused_kernel(x, weight):
        return grouped_mm(x, weight.mT, offs=group_ends(expert, len(weight)))
    if len(x) <= len(weight) or is_capturing(x):  # nothing waits for the device
        return torch.bmm(weight[expert], x[..., None]).squeeze(-1)
    groups = x.split(group_sizes(expert, len(weight)))
    return torch.cat([group @ one.mT for group, one in zip(groups, weight, strict=True)])


def compute_outer(y: Tensor, x: Tensor, expert: Tensor, n_experts: int) -> Tensor:
    """``grouped_outer`` on a device."""
    sizes = group_sizes(expert, n_experts)
    pairs = zip(y.split(sizes), x.split(sizes), strict=True)
    return torch.stack([a.mT @ b for a, b in pairs])


def linear_shape(x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """``grouped_linear`` without numbers."""
    return x.new_empty(x.shape[0], weight.shape[1])


def outer_shape(y: Tensor, x: Tensor, expert: Tensor, n_experts: int) -> Tensor:
    """``grouped_outer`` without numbers."""
    return x.new_empty(n_experts, y.shape[1], x.shape[1])


def group_ends(expert: Tensor, n_experts: int) -> Tensor:
    """The number of rows of every expert and of those before it, [E] int32."""
    numbers = torch.arange(n_experts, device=expert.device)
    return torch.searchsorted(expert, numbers, right=True, out_int32=True)


def group_sizes(expert: Tensor, n_experts: int) -> list[int]:
    """The number of rows of every expert. Waits for the device."""
    ends = group_ends(expert, n_experts)
    sizes: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return sizes


def has_fused_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has one kernel for all experts, which does not wait for the device."""
    widths = weight.shape[1:]
    return x.is_cuda and x.dtype == torch.bfloat16 and not any(w % ALIGNMENT for w in widths)


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may wait for the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def save_for_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the backward pass of ``grouped_linear`` needs."""
    ctx.save_for_backward(*inputs)


def linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """Gradients of ``grouped_linear`` by rows and weights, by operations that have gradients."""
    x, weight, expert = ctx.saved_tensors
    grad_x = grouped_linear(grad, weight.mT, expert)
    return grad_x, grouped_outer(grad, x, expert, len(weight)), None


def save_for_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Save what the backward pass of ``grouped_outer`` needs."""
    ctx.save_for_backward(*inputs[:3])


def outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    """Gradients of ``grouped_outer`` by both factors."""
    y, x, expert = ctx.saved_tensors
    return grouped_linear(x, grad, expert), grouped_linear(y, grad.mT, expert), None, None


def linear_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """FLOPs of ``grouped_linear`` from shapes: every row meets one expert."""
    return int(2 * x[0] * weight[1] * weight[2])


def outer_flops(y: Any, x: Any, *_: Any, **__: Any) -> int:
    """FLOPs of ``grouped_outer`` from shapes."""
    return int(2 * x[0] * x[1] * y[1])


def register_operation(
    name: str,
    schema: str,
    compute: Callable[..., Tensor],
    shape: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor | None, ...]],
    save: Callable[..., None],
    flops: Callable[..., int],
) -> Callable[..., Tensor]:
    """Register an operation. By single steps: torch.library.custom_op would import the compiler at
    the first call, for seconds.
    """
    qualified = operator_name(__name__, name)
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default", compute)
    torch.library.register_fake(qualified, shape)
    torch.library.register_autograd(qualified, backward, setup_context=save)
    operation: Callable[..., Tensor] = attrgetter(qualified.replace("::", "."))(torch.ops)
    register_flop_formula(operation)(flops)
    return operation


LINEAR = register_operation(
    "grouped_linear",
    "(Tensor x, Tensor weight, Tensor expert) -> Tensor",
    compute_linear,
    linear_shape,
    linear_backward,
    save_for_linear,
    linear_flops,
)
OUTER = register_operation(
    "grouped_outer",
    "(Tensor y, Tensor x, Tensor expert, int n_experts) -> Tensor",
    compute_outer,
    outer_shape,
    outer_backward,
    save_for_outer,
    outer_flops,
)
