"""For mixers whose state is a summary of all of the past: where documents begin, a short causal
convolution that carries its tail along, and segments cut into chunks.

A recurrent mixer sets ``reach = None`` and returns its state row first. What a token sees of the
past is given by ``first_seen``: nothing before it may reach the token, whatever the state holds.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lswt_core.interfaces import LayerContext


def first_seen(context: LayerContext) -> Tensor | None:
    """The first token that each token sees, [B or 1, T], counted from the start of the segment:
    negative where its document began in an earlier segment, so that the state is seen. None: every
    token sees all of the past.
    """
    if context.first_visible is None:
        return None
    return context.first_visible - context.positions[0]


def document_starts(context: LayerContext) -> Tensor | None:
    """Whether a document starts at each token, bool [B or 1, T]: a recurrent state is reset before
    it. None: nowhere.
    """
    if context.first_visible is None:
        return None
    return context.first_visible == context.positions


class CausalConvolution(nn.Module):
    """A short depthwise convolution over the last ``size`` tokens of a document, the token itself
    included. Its state is the inputs of the last ``size - 1`` tokens.
    """

    def __init__(self, channels: int, size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(channels, size))  # the newest token's last
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        """As torch.nn.Conv1d: uniform within 1 / sqrt(size)."""
        with torch.no_grad():
            self.weight.copy_((2 * torch.rand(self.weight.shape) - 1) * self.size**-0.5)
            if self.bias is not None:
                self.bias.copy_((2 * torch.rand(self.bias.shape) - 1) * self.size**-0.5)

    def forward(
        self, x: Tensor, tail: Tensor | None, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Inputs [B, T, C], the tail [B, size - 1, C] of earlier segments (None: zeros) and
        ``first_seen`` -> [B, T, C] and the next tail.
        """
        length, before = x.shape[1], self.size - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], before, x.shape[2])
        extended = torch.cat((tail.to(x.dtype), x), dim=1)
        place = torch.arange(length, device=x.device)
        terms = []
        for back in range(self.size):
            term = (
                extended[:, before - back : before - back + length] * self.weight[:, before - back]
            )
            if first is not None and back:
                term = term.masked_fill((place - back < first)[..., None], 0)
            terms.append(term)
        out = torch.stack(terms).sum(0)
        if self.bias is not None:
            out = out + self.bias
        return out, extended[:, length:]


def split_chunks(x: Tensor, size: int) -> Tensor:
    """[B, T, ...] -> [B, n, size, ...], zeros after the end."""
    missing = -x.shape[1] % size
    if missing:
        x = pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    return x.unflatten(1, (-1, size))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which tensors on the device of x keep their dtype."""
    if x.device.type == "meta":
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
