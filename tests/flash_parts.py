"""Stand-ins for the generations of the flash-attn package, with the signatures that it has and
plain arithmetic inside.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import lswt_flash.versions as versions_module
import pytest
import torch
from torch import Tensor

Three = tuple[Tensor, Tensor, Tensor]


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention and the logarithm of its sums; a causal mask is aligned to the bottom right."""
    size, keys, shared = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (kv.repeat_interleave(shared, 2) for kv in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    scores = cap * (scores / cap).tanh() if cap else scores
    hidden = torch.ones(size, keys, dtype=torch.bool, device=q.device)
    hidden = hidden.triu(keys - size + 1) & causal
    scores = scores.masked_fill(hidden, -torch.inf)
    total = scores.logsumexp(-1)
    return torch.einsum("bhij,bjhd->bihd", (scores - total[..., None]).exp(), v).contiguous(), total


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    total: Tensor,
    scale: float,
    causal: bool,
    cap: float = 0.0,
) -> Three:
    """Gradients from whatever output and sums it is given, as the kernels have them."""
    size, keys, groups = q.shape[1], k.shape[1], k.shape[2]
    k, v = (kv.repeat_interleave(q.shape[2] // groups, 2) for kv in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    slope = 1 - (scores / cap).tanh().square() if cap else 1
    scores = cap * (scores / cap).tanh() if cap else scores
    hidden = torch.ones(size, keys, dtype=torch.bool, device=q.device)
    hidden = hidden.triu(keys - size + 1) & causal
    p = (scores.masked_fill(hidden, -torch.inf) - total[..., None]).exp()
    of_p = torch.einsum("bihd,bjhd->bhij", grad, v)
    of_scores = p * (of_p - torch.einsum("bihd,bihd->bhi", grad, out)[..., None])
    of_scores = of_scores * slope * scale
    of_k, of_v = (
        torch.einsum("bhij,bihd->bjhd", a, b).unflatten(2, (groups, -1)).sum(3)
        for a, b in ((of_scores, q), (p, grad))
    )
    return torch.einsum("bhij,bjhd->bihd", of_scores, k).contiguous(), of_k, of_v


def forward_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Any = None,
    *,
    softmax_scale: float,
    causal: bool,
    softcap: float | None = None,
    return_lse: bool,
) -> tuple[Any, ...]:
    """flash_attn/cute/interface.py."""
    out, total = forward(q, k, v, softmax_scale, causal, softcap or 0.0)
    return out, total if return_lse else None, None, None


def backward_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    *,
    deterministic: bool = False,
) -> Three:
    """The same."""
    assert softmax_scale is not None
    return backward(dout, q, k, v, out, lse, softmax_scale, causal, softcap)


def forward_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Any = None,
    *,
    softmax_scale: float,
    causal: bool = False,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    """hopper/flash_attn_interface.py."""
    outputs = forward(q, k, v, softmax_scale, causal, softcap)
    return (*outputs, torch.tensor([]), torch.tensor([]))


def backward_3(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """The same."""
    gradients = backward(dout, q, k, v, out, softmax_lse, softmax_scale, is_causal, softcap)
    return written(gradients, dq, dk, dv)


def forward_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, ...]:
    """flash_attn/flash_attn_interface.py."""
    assert (
        dropout_p,
        window_size_left,
        window_size_right,
        alibi_slopes,
        return_softmax,
    ) == (0.0, -1, -1, None, False)
    outputs = forward(q, k, v, softmax_scale, causal, softcap)
    return (*outputs, torch.tensor([]), torch.tensor([]))


def backward_2(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The same."""
    assert (dropout_p, window_size_left, window_size_right, alibi_slopes) == (0.0, -1, -1, None)
    gradients = backward(dout, q, k, v, out, softmax_lse, softmax_scale, causal, softcap)
    return written(gradients, dq, dk, dv)


def written(gradients: Three, *targets: Tensor) -> Tensor:
    """Gradients where the caller wants them; what the package returns is something else."""
    for target, gradient in zip(targets, gradients, strict=True):
        target.copy_(gradient)
    return torch.tensor([])


PACKAGES: dict[int, Any] = {
    4: SimpleNamespace(_flash_attn_fwd=forward_4, _flash_attn_bwd=backward_4),
    3: SimpleNamespace(_flash_attn_forward=forward_3, _flash_attn_backward=backward_3),
    2: SimpleNamespace(_flash_attn_forward=forward_2, _flash_attn_backward=backward_2),
}


def install(monkeypatch: pytest.MonkeyPatch, *versions: int) -> None:
    """Have some generations and no others, and try them on the CPU."""
    monkeypatch.setattr(versions_module, "selected_versions", {})
    try_out = versions_module.first_verified
    monkeypatch.setattr(
        versions_module,
        "first_verified",
        lambda kernels, need: try_out(kernels, need._replace(device="cpu", dtype=torch.float64)),
    )
    for version, home in versions_module.MODULES.items():
        for name in (home.rpartition(".")[0], home.split(".")[0]):
            if name:
                monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, home, PACKAGES[version] if version in versions else None)
