"""Hessian-vector products of a loss that is a sum over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lswt_core.interfaces import AttentionRequirements, Unsupported
from lswt_core.plugin_api.sharded_tensor import global_norm, is_sharded, local_tensors
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention

# Evaluates the losses of all micro-batches, one at a time; their sum is the loss.
MicroBatchLosses = Callable[[], Iterable[Tensor]]
RELATIVE_STEP = 1e-3  # of finite differences


def exact_hvp(
    losses: MicroBatchLosses, params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """The Hessian times ``vectors``, by differentiating the gradient's inner product with them
    (Pearlmutter 1994). The losses must support a double backward pass.
    """
    product = [torch.zeros_like(p) for p in params]
    for loss in losses():
        gradients = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        inner = [(g * v).sum() for g, v in zip(gradients, vectors, strict=True)]
        second = torch.autograd.grad(torch.stack(inner).sum(), params, materialize_grads=True)
        torch._foreach_add_(product, list(second))
    return product


def finite_difference_hvp(
    losses: MicroBatchLosses, params: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """The Hessian times ``vectors``, by central differences of the gradient g:
    (g(w + e v) - g(w - e v)) / 2e with e = 1e-3 |w| / |v|.

    That step is one order above float32's rounding noise and one below the change of curvature, so
    losses must be computed in float32. Weights are restored bitwise.
    """
    weights = [p.detach().clone() for p in params]
    weight_norm = global_norm(weights)
    epsilon = float(RELATIVE_STEP * weight_norm / global_norm(vectors))
    with perturbed(params, weights, vectors, epsilon):
        ahead = sum_gradients(losses, params)
    with perturbed(params, weights, vectors, -epsilon):
        behind = sum_gradients(losses, params)
    for a, b in zip(local_tensors(ahead), local_tensors(behind), strict=True):
        a.sub_(b).div_(2 * epsilon)
    return ahead


def sum_gradients(losses: MicroBatchLosses, params: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of the sum of the losses; ``p.grad`` is left alone. By backward passes:
    ``torch.autograd.grad`` finds nothing where parameters are sharded.
    """
    inputs = None if is_sharded(params[0]) else list(params)
    with swapped_gradients(params, [torch.zeros_like(p) for p in params]) as accumulated:
        for loss in losses():
            loss.backward(inputs=inputs)
        return [gradient for gradient in accumulated() if gradient is not None]


@contextmanager
def swapped_gradients(
    params: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Iterator[Callable[[], list[Tensor | None]]]:
    """Every ``p.grad`` is that of ``gradients`` within the block, and what it was after it. Yields
    a function that returns what ``p.grad`` has become.
    """
    own = [p.grad for p in params]
    try:
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        yield lambda: [p.grad for p in params]
    finally:
        for p, gradient in zip(params, own, strict=True):
            p.grad = gradient


@contextmanager
def perturbed(
    params: Sequence[Tensor], weights: Sequence[Tensor], vectors: Sequence[Tensor], step: float
) -> Iterator[None]:
    """Set parameters to ``weights + step * vectors`` within the block, to ``weights`` after it."""
    try:
        with torch.no_grad():
            pieces = (local_tensors(tensors) for tensors in (params, weights, vectors))
            for p, weight, vector in zip(*pieces, strict=True):
                p.copy_(weight + step * vector)
        yield
    finally:
        with torch.no_grad():
            for p, weight in zip(local_tensors(params), local_tensors(weights), strict=True):
                p.copy_(weight)


def supports_double_backward(model: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model's attention backends can be differentiated twice."""
    for module in model.modules():
        if isinstance(module, SoftmaxAttention):
            needs = AttentionRequirements(device.type, dtype, module.d_head, double_backward=True)
            try:
                module.backend.require(needs)
            except Unsupported:
                return False
    return True
