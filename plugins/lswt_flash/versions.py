"""Versions 2, 3 and 4 of FlashAttention behind one interface: custom operators for the forward and
the backward pass, which torch.compile does not trace into.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from lswt_core.interfaces import AttentionRequirements, Unsupported
from lswt_core.plugin_api.attention import softmax_scale
from lswt_core.plugin_api.attention_merge import (
    PROBE_CAP,
    BackwardInputs,
    Gradients,
    Kernel,
    first_verified,
)
from lswt_core.plugin_api.operators import operator_name
from lswt_core.plugin_api.query_gradient import WITH_TRITON, QueryGradient
from lswt_core.plugin_api.short_blocks import ShortBlocks

# The module with the forward and backward pass of every version, newest first.
MODULES = {
    4: "flash_attn.cute.interface",
    3: "flash_attn_interface",
    2: "flash_attn.flash_attn_interface",
}


def cap_option(soft_cap: float) -> dict[str, float]:
    """The keyword of a cap on scores; none if there is no cap, as not every release takes it."""
    return {"softcap": soft_cap} if soft_cap else {}


def attend_4(
    module: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, soft_cap: float
) -> tuple[Tensor, Tensor]:
    """Forward pass of FlashAttention 4 (flash-attn-4, written in CuTe)."""
    options = {"softmax_scale": softmax_scale(q), "causal": causal, **cap_option(soft_cap)}
    out, logsumexp, *_ = module._flash_attn_fwd(q, k, v, return_lse=True, **options)
    return out, logsumexp


def differentiate_4(
    module: Any, inputs: BackwardInputs, soft_cap: float, deterministic: bool
) -> Gradients:
    """Backward pass of FlashAttention 4."""
    grad, q, k, v, out, logsumexp, causal = inputs
    options = {
        "softmax_scale": softmax_scale(q),
        "causal": causal,
        "deterministic": deterministic,
        **cap_option(soft_cap),
    }
    dq, dk, dv, *_ = module._flash_attn_bwd(q, k, v, out, grad, logsumexp, **options)
    return dq, dk, dv


def attend_3(
    module: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, soft_cap: float
) -> tuple[Tensor, Tensor]:
    """Forward pass of FlashAttention 3 (built from the package's hopper directory)."""
    options = {"softmax_scale": softmax_scale(q), "causal": causal, **cap_option(soft_cap)}
    out, logsumexp, *_ = module._flash_attn_forward(q, k, v, **options)
    return out, logsumexp


def differentiate_3(
    module: Any, inputs: BackwardInputs, soft_cap: float, deterministic: bool
) -> Gradients:
    """Backward pass of FlashAttention 3, which writes into given tensors."""
    grad, q, k, v, out, logsumexp, causal = inputs
    into = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    options = {
        "softmax_scale": softmax_scale(q),
        "is_causal": causal,
        "deterministic": deterministic,
        **cap_option(soft_cap),
    }
    module._flash_attn_backward(grad, q, k, v, out, logsumexp, **into, **options)
    return into["dq"], into["dk"], into["dv"]


NO_WINDOW: dict[str, Any] = {
    "window_size_left": -1,
    "window_size_right": -1,
    "alibi_slopes": None,
}


def attend_2(
    module: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, soft_cap: float
) -> tuple[Tensor, Tensor]:
    """Forward pass of FlashAttention 2 (flash-attn from 2.7)."""
    options = {
        "dropout_p": 0.0,
        "softmax_scale": softmax_scale(q),
        "causal": causal,
        "softcap": soft_cap,
        "return_softmax": False,
    }
    out, logsumexp, *_ = module._flash_attn_forward(q, k, v, **options, **NO_WINDOW)
    return out, logsumexp


def differentiate_2(
    module: Any, inputs: BackwardInputs, soft_cap: float, deterministic: bool
) -> Gradients:
    """Backward pass of FlashAttention 2, which writes into given tensors."""
    grad, q, k, v, out, logsumexp, causal = inputs
    into = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    options = {
        "dropout_p": 0.0,
        "softmax_scale": softmax_scale(q),
        "causal": causal,
        "softcap": soft_cap,
        "deterministic": deterministic,
    }
    module._flash_attn_backward(grad, q, k, v, out, logsumexp, **into, **options, **NO_WINDOW)
    return into["dq"], into["dk"], into["dv"]


FORWARD = {4: attend_4, 3: attend_3, 2: attend_2}
BACKWARD = {4: differentiate_4, 3: differentiate_3, 2: differentiate_2}


def flash_module(version: int) -> Any:
    """The module of a version. Raises whatever importing it raises: a missing package, a build for
    another torch, a kernel compiler that fails.
    """
    return importlib.import_module(MODULES[version])


@library.custom_op(operator_name(__name__, "attend"), mutates_args=())
def flash_attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, soft_cap: float, version: int
) -> tuple[Tensor, Tensor]:
    """The output [B, T, H, D], and the logsumexp of the scores [B, H, T]."""
    out, logsumexp = FORWARD[version](flash_module(version), q, k, v, causal, soft_cap)
    return out, logsumexp


@flash_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, soft_cap: float, version: int
) -> tuple[Tensor, Tensor]:
    rows, length, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty(
        (rows, heads, length), dtype=torch.promote_types(q.dtype, torch.float32)
    )


@library.custom_op(operator_name(__name__, "differentiate"), mutates_args=())
def flash_differentiate(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    causal: bool,
    soft_cap: float,
    version: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    inputs = BackwardInputs(grad, q, k, v, out, logsumexp, causal)
    return BACKWARD[version](flash_module(version), inputs, soft_cap, deterministic)


@flash_differentiate.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class FlashKernel(Kernel):
    """A version of FlashAttention."""

    def __init__(self, version: int, deterministic: bool, soft_cap: float = 0.0) -> None:
        self.version, self.deterministic, self.soft_cap = version, deterministic, soft_cap

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, logsumexp = flash_attend(q, k, v, causal, self.soft_cap, self.version)
        return out, logsumexp

    def backward(self, inputs: BackwardInputs) -> Gradients:
        """See Kernel."""
        options = (self.soft_cap, self.version, self.deterministic)
        dq, dk, dv = flash_differentiate(*inputs, *options)
        return dq, dk, dv


class Choice(NamedTuple):
    """A version, and whether the gradient of queries alone is Triton's."""

    version: int
    with_triton: bool

    def __str__(self) -> str:
        return f"version {self.version}{f' {WITH_TRITON}' if self.with_triton else ''}"


def kernel_of(choice: Choice, deterministic: bool, soft_cap: float = 0.0) -> Kernel:
    """FlashAttention that leaves attention sinks to plain products."""
    kernel: Kernel = FlashKernel(choice.version, deterministic, soft_cap)
    return ShortBlocks(QueryGradient(kernel) if choice.with_triton else kernel)


# By what the probe depends on: the version selected, and what is wrong with newer ones.
selected_versions: dict[tuple[torch.dtype, int, int, bool, bool], tuple[Choice, list[str]]] = {}


def newest_verified(need: AttentionRequirements, deterministic: bool) -> tuple[Choice, list[str]]:
    """The newest installed version that passes a small test on the device, and what is wrong with
    newer ones and with Triton's gradient. Raises Unsupported, with the reasons, if there is none.
    """
    key = (need.dtype, need.d_head, need.queries_per_kv, need.has_transform, deterministic)
    if key not in selected_versions:
        selected_versions[key] = verify_versions(need, deterministic)
    return selected_versions[key]


def verify_versions(need: AttentionRequirements, deterministic: bool) -> tuple[Choice, list[str]]:
    """As ``newest_verified``, without its cache."""
    failures: list[str] = []
    for version in MODULES:
        choice, faults = verify_version(version, need, deterministic)
        failures += faults
        if choice is not None:
            return choice, failures
    raise Unsupported(
        "the flash-attn package cannot be used (pip install --no-build-isolation flash-attn): "
        + "; ".join(failures)
    )


def verify_version(
    version: int, need: AttentionRequirements, deterministic: bool
) -> tuple[Choice | None, list[str]]:
    """How a version is used, None if it cannot be, and what is wrong with it."""
    try:
        flash_module(version)
    except Exception as error:  # the package raises errors of any class
        return None, [f"version {version}: {error}"]
    soft_cap = PROBE_CAP if need.has_transform else 0.0
    choices = Choice(version, with_triton=True), Choice(version, with_triton=False)
    return first_verified({one: kernel_of(one, deterministic, soft_cap) for one in choices}, need)
