"""RWKV's channel mixing: a feed-forward layer that sees the previous token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import (
    Dims,
    LayerContext,
    LayerOutput,
    State,
    StatefulFeedForward,
)


class TokenShift(StatefulFeedForward):
    """Channel mixing of RWKV-4 (Peng et al. 2023, arXiv 2305.13048, section 3.1.4):
    ``sigmoid(receptance(x_r)) * value(relu(key(x_k))^2)``, where x_k and x_r mix every channel of a
    token with that of the token before it, ``mu * x_t + (1 - mu) * x_(t-1)``.

    ``d_ffn`` is the width of the key. Every channel's mu is learned, and starts at
    (channel / d_model)^(1 - layer / n_layers) as in the authors' code. The first token of a text
    has zeros before it. The state is the last token.
    """

    name = "token-shift"
    reach = 1
    citation = """@inproceedings{peng2023rwkv,
  title={RWKV: Reinventing RNNs for the Transformer Era}, author={Peng, Bo and others},
  booktitle={Findings of EMNLP}, year={2023}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.key = nn.Linear(dims.d_model, dims.d_ffn, bias=False)
        self.receptance = nn.Linear(dims.d_model, dims.d_model, bias=False)
        self.value = nn.Linear(dims.d_ffn, dims.d_model, bias=False)
        self.key_mix = nn.Parameter(torch.empty(dims.d_model))
        self.receptance_mix = nn.Parameter(torch.empty(dims.d_model))
        self.exponent = 1 - dims.layer / dims.n_layers

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set how much of the token itself every channel keeps."""
        width = len(self.key_mix)
        kept = (torch.arange(width, dtype=torch.float64) / width) ** self.exponent
        self.key_mix.copy_(kept)
        self.receptance_mix.copy_(kept)

    def forward(  # type: ignore[override]
        self, x: Tensor, state: State, context: LayerContext
    ) -> LayerOutput:
        """[B, T, M] -> [B, T, M]; the state is the last token [B, 1, M]."""
        before = self.previous_tokens(x, state, context)
        key = self.key(before.lerp(x, self.key_mix))
        gate = self.receptance(before.lerp(x, self.receptance_mix)).sigmoid()
        return LayerOutput(gate * self.value(relu(key).square()), x[:, -1:].detach())

    def previous_tokens(self, x: Tensor, state: Tensor | None, context: LayerContext) -> Tensor:
        """The token before each one of x [B, T, M]; zeros where a text or a document starts."""
        last = torch.zeros_like(x[:, :1]) if state is None else state.to(x.dtype)
        before = torch.cat((last, x[:, :-1]), dim=1)
        if context.first_visible is None:
            return before
        is_visible = context.first_visible < context.positions  # [B or 1, T]
        return before.masked_fill(~is_visible[..., None], 0)


@hookimpl
def lswt_components() -> list[type]:
    """Offer the token shift."""
    return [TokenShift]
