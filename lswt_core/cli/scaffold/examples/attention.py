"""An attention backend: some queries at a time, so that the scores of few are held at once."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, AttentionRequirements, Dims, KVBlock, Unsupported
from lswt_core.plugin_api.attention import concatenate_blocks


class Example(AttentionBackend):
    """One softmax over all keys, for ``queries`` queries at a time: what every backend computes,
    with masks no taller than that.
    """

    name = "example"
    citation = "@misc{lswt_example, title={lswt-example}, author={its authors}}"

    def __init__(self, dims: Dims, *, queries: Annotated[int, Ge(1)] = 256) -> None:
        super().__init__(dims)
        self.queries = queries

    def require(self, need: AttentionRequirements) -> None:
        """Refuse, while the model is built, what this cannot do."""
        if need.double_backward:
            raise Unsupported(
                "torch's fused attention has no second derivative; use attention 'eager'"
            )

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        """Change how it is computed, never what. -> [B, T, H, D]."""
        width = parts[0].v.shape[-1]
        q, k, v, mask = concatenate_blocks(parts)
        k, v, out = k.transpose(1, 2), v.transpose(1, 2), []  # [B, H, N, D]
        for first in range(0, q.shape[1], self.queries):
            rows = slice(first, first + self.queries)
            seen = None if mask is None else mask[:, :, rows]  # [B or 1, H or 1, queries, N]
            out.append(
                scaled_dot_product_attention(
                    q[:, rows].transpose(1, 2), k, v, attn_mask=seen, scale=width**-0.5
                )
            )
        return torch.cat(out, dim=2).transpose(1, 2)[..., :width]


@hookimpl
def lswt_components() -> list[type]:
    """What this plugin offers."""
    return [Example]
