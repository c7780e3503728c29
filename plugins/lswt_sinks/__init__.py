"""Attention sinks without a value: a head can attend to nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, KeyValue, KVProjection, Memory, State


class SoftmaxOffByOne(Memory):
    """A 1 in the softmax's denominator: exp(s_i) / (1 + sum_j exp(s_j)) (Miller 2023).

    Implemented as a sink whose key and value are zero; has no parameters.
    """

    name = "softmax-off-by-one"
    citation = """@misc{miller2023attention,
  title={Attention Is Off By One}, author={Miller, Evan}, year={2023},
  howpublished={\\url{https://www.evanmiller.org/attention-is-off-by-one.html}}}"""

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Add a sink of zeros; there is no state."""
        blocks = project(x, positions)
        zeros = torch.zeros_like(blocks[-1].v[:, :1])  # [B, 1, G, D]
        return [KeyValue(zeros, zeros, None), *blocks], None


class SinkLogit(Memory):
    """gpt-oss's learned logit b_h per head in the softmax's denominator: exp(s_i) / (exp(b_h) +
    sum_j exp(s_j)).

    After OpenAI 2025 (arXiv 2508.10925). Logits start at 0, which is softmax-off-by-one.
    Implemented as a sink with the key (b_h sqrt(D), 0, ...) and a constant query (1, 0, ...), so
    any attention backend supports it, in its own precision. Query heads that share a key have
    (b_h sqrt(D), 0, ...) as their queries, and the key is constant.
    """

    name = "sink-logit"
    citation = """@article{openai2025gptoss,
  title={gpt-oss-120b \\& gpt-oss-20b Model Card}, author={{OpenAI}},
  journal={arXiv preprint arXiv:2508.10925}, year={2025}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.logits = nn.Parameter(torch.empty(dims.n_heads))  # [H]

    def reset_parameters(self) -> None:
        """Start at 0."""
        nn.init.zeros_(self.logits)

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        """Add the sink; there is no state."""
        blocks = project(x, positions)
        zeros = torch.zeros_like(blocks[-1].v[:, :1])  # [B, 1, G, D]
        unit = zeros.clone()
        unit[..., 0] = 1
        logits = (self.logits * zeros.shape[-1] ** 0.5).to(zeros.dtype)[:, None]  # [H, 1]
        if len(self.logits) == zeros.shape[2]:  # in the key, where no gradient is summed over T
            return [KeyValue(unit * logits, zeros, None, q=unit), *blocks], None
        query = unit[:, :, :1] * logits  # [B, 1, H, D]
        return [KeyValue(unit, zeros, None, q=query), *blocks], None


@hookimpl
def lswt_components() -> list[type]:
    """Offer sinks without a value."""
    return [SoftmaxOffByOne, SinkLogit]
