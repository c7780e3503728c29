"""The flash-attn package's generations behind one interface: two custom operators, which compilers
need not look into.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, library

from lswt_core.interfaces import AttentionRequirements, Unsupported
from lswt_core.plugin_api.attention import softmax_scale
from lswt_core.plugin_api.attention_merge import Gradients, Kernel, find_fault

# newest first: generation, and the module with its forward and backward passes
HOMES = {
    4: "flash_attn.cute.interface",
    3: "flash_attn_interface",
    2: "flash_attn.flash_attn_interface",
}


def attend_4(home: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention 4 (flash-attn-4, written in CuTe)."""
    out, total, *_ = home._flash_attn_fwd(
        q, k, v, softmax_scale=softmax_scale(q), causal=causal, return_lse=True
    )
    return out, total


def differentiate_4(
    home: Any,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    causal: bool,
    deterministic: bool,
) -> Gradients:
    """Its backward pass."""
    options = {"softmax_scale": softmax_scale(q), "causal": causal, "deterministic": deterministic}
    dq, dk, dv, *_ = home._flash_attn_bwd(q, k, v, out, grad, total, **options)
    return dq, dk, dv


def attend_3(home: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention 3 (built from the package's hopper directory)."""
    out, total, *_ = home._flash_attn_forward(
        q, k, v, softmax_scale=softmax_scale(q), causal=causal
    )
    return out, total


def differentiate_3(
    home: Any,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    causal: bool,
    deterministic: bool,
) -> Gradients:
    """Its backward pass, which writes where it is told."""
    into = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    options = {
        "softmax_scale": softmax_scale(q),
        "is_causal": causal,
        "deterministic": deterministic,
    }
    home._flash_attn_backward(grad, q, k, v, out, total, **into, **options)
    return into["dq"], into["dk"], into["dv"]


NO_WINDOW: dict[str, Any] = {
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def attend_2(home: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """FlashAttention 2 (flash-attn from 2.7)."""
    options = {
        "dropout_p": 0.0,
        "softmax_scale": softmax_scale(q),
        "causal": causal,
        "return_softmax": False,
    }
    out, total, *_ = home._flash_attn_forward(q, k, v, **options, **NO_WINDOW)
    return out, total


def differentiate_2(
    home: Any,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    causal: bool,
    deterministic: bool,
) -> Gradients:
    """Its backward pass, which writes where it is told."""
    into = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    options = {
        "dropout_p": 0.0,
        "softmax_scale": softmax_scale(q),
        "causal": causal,
        "deterministic": deterministic,
    }
    home._flash_attn_backward(grad, q, k, v, out, total, **into, **options, **NO_WINDOW)
    return into["dq"], into["dk"], into["dv"]


ATTEND = {4: attend_4, 3: attend_3, 2: attend_2}
DIFFERENTIATE = {4: differentiate_4, 3: differentiate_3, 2: differentiate_2}


def home_of(generation: int) -> Any:
    """The module of a generation; raises whatever importing the package raises: a missing package,
    a build for another torch, a compiler of kernels that refuses.
    """
    return importlib.import_module(HOMES[generation])


@library.custom_op("lswt_flash::attend", mutates_args=())
def flash_attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, generation: int
) -> tuple[Tensor, Tensor]:
    """The weighted sum of values [B, T, H, D], and the logarithm of the sum of exp(scores) [B, H,
    T].
    """
    out, total = ATTEND[generation](home_of(generation), q, k, v, causal)
    return out, total


@flash_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, generation: int) -> tuple[Tensor, Tensor]:
    rows, length, heads, _ = q.shape
    return torch.empty_like(q), q.new_empty(
        (rows, heads, length), dtype=torch.promote_types(q.dtype, torch.float32)
    )


@library.custom_op("lswt_flash::differentiate", mutates_args=())
def flash_differentiate(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    causal: bool,
    generation: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    return DIFFERENTIATE[generation](
        home_of(generation), grad, q, k, v, out, total, causal, deterministic
    )


@flash_differentiate.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    causal: bool,
    generation: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class FlashKernel(Kernel):
    """A generation of the package."""

    def __init__(self, generation: int, deterministic: bool) -> None:
        self.generation, self.deterministic = generation, deterministic

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See Kernel."""
        out, total = flash_attend(q, k, v, causal, self.generation)
        return out, total

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        total: Tensor,
        causal: bool,
    ) -> Gradients:
        """See Kernel."""
        dq, dk, dv = flash_differentiate(
            grad, q, k, v, out, total, causal, self.generation, self.deterministic
        )
        return dq, dk, dv


GENERATIONS = {
    (generation, fixed): FlashKernel(generation, fixed)
    for generation in HOMES
    for fixed in (False, True)
}
# what was tried is not tried again
searched: dict[tuple[torch.dtype, int, bool], tuple[int, list[str]]] = {}


def newest_sound(need: AttentionRequirements, deterministic: bool) -> tuple[int, list[str]]:
    """The newest generation that is installed and gives, in a small trial on the device, what it
    should; and what is wrong with newer ones. Raises Unsupported, with every cause, if there is
    none.
    """
    key = (need.dtype, need.d_head, deterministic)
    if key not in searched:
        searched[key] = search(need, deterministic)
    return searched[key]


def search(need: AttentionRequirements, deterministic: bool) -> tuple[int, list[str]]:
    """The same, looked for anew."""
    causes: list[str] = []
    for generation in HOMES:
        try:
            home_of(generation)
        except Exception as error:  # the package's own errors are of any class
            causes.append(f"version {generation}: {error}")
            continue
        fault = find_fault(GENERATIONS[generation, deterministic], need)
        if fault is None:
            return generation, causes
        causes.append(f"version {generation}: {fault}")
    raise Unsupported(
        "the flash-attn package cannot be used (pip install --no-build-isolation flash-attn): "
        + "; ".join(causes)
    )
