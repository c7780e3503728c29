"""Sinks without a value: somewhere for attention to go when no token deserves it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State


class SoftmaxOffByOne(Memory):
    """One more in the softmax's denominator, so that a head may attend to nothing: exp(s_i) / (1 +
    sum_j exp(s_j)) (Miller 2023).

    It is a sink whose key and value are zero, and learns nothing.
    """

    name = "softmax-off-by-one"
    citation = """@misc{miller2023attention,
  title={Attention Is Off By One}, author={Miller, Evan}, year={2023},
  howpublished={\\url{https://www.evanmiller.org/attention-is-off-by-one.html}}}"""

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Add a sink of zeros; nothing is remembered."""
        segments = project(x, positions)
        nothing = torch.zeros_like(segments[-1].v[:, :1])  # [B, 1, H, D]
        return [KeyValue(nothing, nothing, None), *segments], None


class SinkLogit(Memory):
    """A learned logit b_h for every head in the softmax's denominator: exp(s_i) / (exp(b_h) + sum_j
    exp(s_j)), as gpt-oss has it.

    After OpenAI 2025 (arXiv 2508.10925). Logits start at 0, where this is softmax-off-by-one. In
    terms of keys, the sink is met by a constant query (1, 0, ...) and has the key (b_h sqrt(D), 0,
    ...): any attention backend computes it, in its own precision.
    """

    name = "sink-logit"
    citation = """@article{openai2025gptoss,
  title={gpt-oss-120b \\& gpt-oss-20b Model Card}, author={{OpenAI}},
  journal={arXiv preprint arXiv:2508.10925}, year={2025}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.logits = nn.Parameter(torch.empty(dims.n_heads))  # [H]

    def reset_parameters(self) -> None:
        """Start as softmax-off-by-one."""
        nn.init.zeros_(self.logits)

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Add the sink; nothing is remembered."""
        segments = project(x, positions)
        like = segments[-1].v[:, :1]  # [B, 1, H, D]
        first = torch.zeros_like(like)
        first[..., 0] = 1
        key = first * (self.logits * like.shape[-1] ** 0.5).to(like.dtype)[:, None]
        return [KeyValue(key, torch.zeros_like(like), None, q=first), *segments], None


@hookimpl
def lswt_components() -> list[type]:
    """Offer sinks without a value."""
    return [SoftmaxOffByOne, SinkLogit]
