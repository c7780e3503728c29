"""Linear attention with a decay per head and token, chunk by chunk: the state is a matrix per head.

``S_t = a_t S_{t-1} + k_t u_t^T``, ``o_t = S_t^T q_t``, where u_t is the value v_t, or with the
delta rule (Yang et al. 2024, arXiv 2412.06464) what is not yet stored under the key,
``u_t = b_t (v_t - a_t S_{t-1}^T k_t)``. Within a chunk all tokens are computed at once, by the
matrix form of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060) and, for the delta rule, by solving one
triangular system; only the states between chunks are computed one after another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lswt_core.plugin_api.fla_kernels import fla_can_run, fla_linear_attention
from lswt_core.plugin_api.recurrence import at_least_float32, split_chunks, without_autocast

CHUNK = 64  # tokens


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    first: Tensor | None = None,
    *,
    write: Tensor | None = None,
    chunk: int = CHUNK,
    use_fla: bool = True,
) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, T, H, K], values [B, T, H, V] -> outputs [B, T, H, V] in their dtype and
    the next state [B, H, K, V] in float32 or wider.

    ``log_decay`` [B, T, H] is log a_t <= 0, ``write`` [B, T, H] is b_t of the delta rule (None: no
    delta rule), ``state`` that of earlier segments (None: zeros), ``first`` what ``first_seen``
    returns. Computed in float32 or wider, in chunks; on CUDA, half-precision inputs go to
    flash-linear-attention's kernels if they are installed and ``use_fla``.
    """
    if use_fla and fla_can_run(q, v):
        return fla_linear_attention(q, k, v, log_decay, write, state, first)
    with without_autocast(q):
        wide = at_least_float32(q), at_least_float32(k), at_least_float32(v)
        write = None if write is None else at_least_float32(write)
        state = None if state is None else state.to(wide[0].dtype)
        size = min(chunk, q.shape[1])
        out, state = in_chunks(*wide, at_least_float32(log_decay), state, first, write, size)
    return out.to(v.dtype), state


class Chunks(NamedTuple):
    """How far states and tokens decay within chunks of C tokens. What a token does not see has
    decayed to 0.
    """

    between: Tensor  # [B, H, n, C, C]: of key j until query i
    since_start: Tensor  # [B, H, n, C]: of the state before the chunk until query i
    until_end: Tensor  # [B, H, n, C]: of key j until the chunk's end

    @classmethod
    def of(cls, log_decay: Tensor, first: Tensor | None) -> Chunks:
        """From the decays [B, H, n, C]; ``first`` as ``first_seen``."""
        n, size = log_decay.shape[-2:]
        total = log_decay.cumsum(-1)
        place = torch.arange(n * size, device=log_decay.device).unflatten(0, (n, size))
        visible = place[:, None, :] <= place[:, :, None]  # [n, C, C]
        since_start = total.exp()
        if first is not None:
            # zeros after the end belong to the last token's document
            ends = first[:, -1:].expand(-1, n * size - first.shape[1])
            bounds = torch.cat((first, ends), dim=1).unflatten(1, (n, size))[:, None]
            visible = visible & (place[:, None, :] >= bounds[..., None])  # [B or 1, 1, n, C, C]
            since_start = since_start.masked_fill(bounds >= place[:, :1], 0)
        between = (
            (total[..., :, None] - total[..., None, :]).masked_fill(~visible, -torch.inf).exp()
        )
        return cls(between, since_start, between[..., -1, :])


def in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    first: Tensor | None,
    write: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """``linear_attention`` in plain torch, in one dtype."""
    length = q.shape[1]
    q, k, v, log_decay = (heads_before_chunks(split_chunks(t, size)) for t in (q, k, v, log_decay))
    decay = Chunks.of(log_decay, first)  # q, k, v [B, H, n, C, K or V]
    seen_keys = k * decay.since_start[..., None]  # as the state before the chunk sees them
    if write is not None:
        b = heads_before_chunks(split_chunks(write, size))[..., None]
        overlap = b * (k @ k.mT) * decay.between  # below the diagonal, which the solver skips
        both = torch.cat((b * v, b * seen_keys), dim=-1)
        both = torch.linalg.solve_triangular(overlap, both, upper=False, unitriangular=True)
        v, seen_keys = both.split((v.shape[-1], k.shape[-1]), dim=-1)
    if state is None:
        state = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    kept_keys = (k * decay.until_end[..., None]).mT
    kept = decay.since_start[..., -1, None, None]  # [B, H, n, 1, 1]
    states, updates = [], []
    for i in range(q.shape[2]):
        states.append(state)
        update = v[:, :, i] if write is None else v[:, :, i] - seen_keys[:, :, i] @ state
        updates.append(update)
        state = kept[:, :, i] * state + kept_keys[:, :, i] @ update
    before = (q * decay.since_start[..., None]) @ torch.stack(states, dim=2)
    out = before + ((q @ k.mT) * decay.between) @ torch.stack(updates, dim=2)
    return out.flatten(2, 3).transpose(1, 2)[:, :length], state


def heads_before_chunks(x: Tensor) -> Tensor:
    """[B, n, C, H, ...] -> [B, H, n, C, ...]."""
    return x.movedim(3, 1)
