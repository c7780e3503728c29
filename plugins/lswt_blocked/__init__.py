"""Attention on CPUs by matrix products, a tile of queries at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lswt_blocked.tiles import attend_tiles
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AttentionBackend, AttentionRequirements, Dims, KVBlock, Unsupported
from lswt_core.plugin_api.attention import reference_attention, refuse_other_parts

FEW_QUERIES = 4  # for so many, plain attention is faster: it does not copy keys and values


class Blocked(AttentionBackend):
    """Exact attention that holds the scores of one tile of queries at a time, and recomputes them
    in the backward pass if they are large.

    Memory-efficient attention (Rabe and Staats 2021, arXiv 2112.05682) for CPUs: in bfloat16 its
    matrix products are several times as fast as torch's fused attention kernel, and the softmax
    between them stays in the cache. Keys above the causal diagonal are skipped tile by tile. Keys
    and values that need no gradient, as those of a KV cache, cost none. Query heads that share a
    key/value head are rows of one product. Scores are rounded to the compute dtype; the softmax is
    computed in float32 at least.
    """

    name = "blocked"
    citation = """@article{rabe2021selfattention,
  title={Self-attention Does Not Need O(n^2) Memory},
  author={Rabe, Markus N and Staats, Charles},
  journal={arXiv preprint arXiv:2112.05682}, year={2021}}"""

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)

    def require(self, need: AttentionRequirements) -> None:
        """Refuse devices other than the CPU, biases, transforms of scores and second
        derivatives.
        """
        if need.device != "cpu":
            raise Unsupported(
                f"blocked attention runs on CPUs, the device is {need.device}; use 'auto'"
            )
        if need.has_bias:
            raise Unsupported("blocked attention adds no attention biases; use 'sdpa' or 'eager'")
        if need.has_transform:
            raise Unsupported("blocked attention transforms no scores; use attention 'eager'")
        if need.double_backward:
            raise Unsupported("blocked attention has no second derivative; use attention 'eager'")

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        """One softmax over the keys of all blocks: -> [B, T, H, D]. Raises Unsupported for biases
        and transforms of scores.
        """
        refuse_other_parts(self.name, blocks, {"first_visible", "selected"})
        if blocks[0].q.shape[1] <= FEW_QUERIES:
            return reference_attention(blocks)
        return attend_tiles(sorted(blocks, key=lambda block: block.causal))


@hookimpl
def lswt_components() -> list[type]:
    """Offer blocked attention."""
    return [Blocked]
