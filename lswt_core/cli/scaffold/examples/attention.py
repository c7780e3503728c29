"""An attention backend: a block of queries at a time, so that the mask is never held whole."""

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
    """torch's scaled_dot_product_attention for ``queries`` queries at a time."""

    name = "example"
    citation = """@misc{lswt_example,
  title={lswt-example}, author={its authors}}"""

    def __init__(self, dims: Dims, *, queries: Annotated[int, Ge(1)] = 256) -> None:
        super().__init__(dims)
        self.queries = queries

    def require(self, need: AttentionRequirements) -> None:
        """Raise Unsupported, while the model is built, for what this backend cannot do."""
        if need.double_backward:
            raise Unsupported(
                "torch's fused attention has no second derivative; use attention 'eager'"
            )
        if need.has_transform:
            raise Unsupported("torch's fused attention transforms no scores; use 'eager'")

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        """Change this: one softmax over the keys of all blocks. -> [B, T, H, D]."""
        d_head = blocks[0].v.shape[-1]
        q, k, v, mask = concatenate_blocks(blocks)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, G, N, D]
        outputs = []
        for start in range(0, q.shape[1], self.queries):
            rows = slice(start, start + self.queries)
            attended = scaled_dot_product_attention(
                q[:, rows].transpose(1, 2),
                k,
                v,
                attn_mask=None if mask is None else mask[:, :, rows],  # [B or 1, H or 1, rows, N]
                scale=d_head**-0.5,
                enable_gqa=k.shape[1] != q.shape[2],
            )
            outputs.append(attended)
        return torch.cat(outputs, dim=2).transpose(1, 2)[..., :d_head]


@hookimpl
def lswt_components() -> list[type]:
    """The components of this plugin."""
    return [Example]
