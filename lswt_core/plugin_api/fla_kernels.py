"""flash-linear-attention's kernels (package ``flash-linear-attention``, Yang and Zhang 2024) behind
two operators that torch.compile does not look into.

The backward pass runs the forward kernel again, so that only the package's public functions are
used. It cannot be differentiated: second derivatives are taken in float32, which these kernels do
not run in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, library

from lswt_core.plugin_api.attention import assume_constant_result
from lswt_core.plugin_api.operators import operator_name

HALF = (torch.bfloat16, torch.float16)
MAX_WIDTH = 256  # of a head's keys and values
SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor? write, Tensor? state, Tensor? first)"
)


@assume_constant_result
@cache
def fla_is_installed() -> bool:
    """Whether the package can be imported."""
    return find_spec("fla") is not None


def fla_can_run(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels run queries [B, T, H, K] and values [B, T, H, V], and are worth it: a
    single token takes no chunk.
    """
    fits = q.shape[1] > 1 and max(q.shape[-1], v.shape[-1]) <= MAX_WIDTH
    return q.device.type == "cuda" and q.dtype in HALF and fits and fla_is_installed()


def fla_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    write: Tensor | None,
    state: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As ``lswt_core.plugin_api.linear_attention.linear_attention``."""
    out, state = forward_operator(q, k, v, log_decay, write, state, first)
    return out, state


def call_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    write: Tensor | None,
    state: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call the package. Documents become sequences of different length, of which those that begin
    before the segment start from the row's state.
    """
    shape = (*q.shape[:1], *q.shape[2:], v.shape[-1])  # B, H, K, V
    if state is None:
        state = torch.zeros(shape, dtype=torch.float32, device=q.device)
    options: dict[str, Any] = {"scale": 1.0, "initial_state": state, "output_final_state": True}
    tensors = {"q": q, "k": k, "v": v, "g": log_decay}
    if write is not None:
        tensors["beta"] = write
    if first is None:
        return run_kernel(tensors, options)
    starts, rows, is_carried = find_sequences(first.expand(q.shape[:2]))
    options["cu_seqlens"] = starts
    options["initial_state"] = state[rows] * is_carried[:, None, None, None]
    tensors = {name: t.reshape(1, -1, *t.shape[2:]) for name, t in tensors.items()}
    out, states = run_kernel(tensors, options)
    last = torch.arange(q.shape[0], device=q.device).add(1)
    ends = torch.searchsorted(rows.contiguous(), last) - 1  # each row's last sequence
    return out.view(v.shape), states[ends]


def find_sequences(first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where sequences begin in the rows laid end to end, with the end [N + 1]; the row of each [N];
    and whether it goes on from the row's state. ``first`` [B, T] as ``first_seen``.
    """
    place = torch.arange(first.shape[1], device=first.device)
    rows, places = ((first == place) | (place == 0)).nonzero(as_tuple=True)
    starts = rows * first.shape[1] + places
    end = starts.new_tensor([first.numel()])
    return torch.cat((starts, end)), rows, (places == 0) & (first[rows, 0] < 0)


def run_kernel(tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run the kernel that the tensors ask for: with or without the delta rule."""
    # by name: transformers asks for every package that an exported model's code imports
    if "beta" in tensors:
        kernel = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    else:
        kernel = import_module("fla.ops.simple_gla").chunk_simple_gla
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    out, state = kernel(**contiguous, **options)
    return out, state


@library.custom_op(
    operator_name(__name__, "linear_attention"),
    mutates_args=(),
    schema=f"{SCHEMA} -> (Tensor, Tensor)",
)
def forward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    write: Tensor | None,
    state: Tensor | None,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and the next state [B, H, K, V]."""
    with torch.no_grad():
        return call_kernel(q, k, v, log_decay, write, state, first)


@forward_operator.register_fake
def forward_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of the outputs and the next state."""
    shape = (*q.shape[:1], *q.shape[2:], v.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(v), q.new_empty(shape, dtype=wide)


@library.custom_op(
    operator_name(__name__, "differentiate_linear_attention"),
    mutates_args=(),
    schema=f"(Tensor by_output, Tensor by_state, {SCHEMA[1:]} -> Tensor[]",
)
def backward_operator(by_output: Tensor, by_state: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """The gradients of the inputs that take one, in their order."""
    leaves = [None if t is None else t.detach().clone() for t in inputs[:-1]]
    given = [t.requires_grad_() for t in leaves if t is not None]
    with recorded_by_autograd():
        outputs = call_kernel(*leaves, inputs[-1])  # type: ignore[arg-type, call-arg]
        return list(torch.autograd.grad(outputs, given, (by_output, by_state)))


@backward_operator.register_fake
def backward_shapes(by_output: Tensor, by_state: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """Shapes and dtypes of the gradients."""
    return [torch.empty_like(t) for t in inputs[:-1] if t is not None]


@contextmanager
def recorded_by_autograd() -> Iterator[None]:
    """Let autograd record within an operator, where torch has switched it off."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    excluded = excluded.remove(torch._C.DispatchKey.AutogradFunctionality)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def keep_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    """Save what the backward pass runs again."""
    ctx.save_for_backward(*inputs)


def differentiate(ctx: Any, by_output: Tensor, by_state: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all inputs."""
    inputs = ctx.saved_tensors
    gradients = iter(backward_operator(by_output, by_state, *inputs))
    return *(None if t is None else next(gradients) for t in inputs[:-1]), None


forward_operator.register_autograd(differentiate, setup_context=keep_inputs)
