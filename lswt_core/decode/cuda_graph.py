"""Decode steps of a single token as a CUDA graph: one replay instead of hundreds of kernel
launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lswt_core.decode.rolling_kv_cache import CacheState
from lswt_core.interfaces import KVBlock
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.attention import reference_attention
from lswt_core.plugin_api.softmax_attention import replace_attention_backends

# ids [B, 1] and their position [] -> hidden states [B, 1, M]
DecodeStep = Callable[[Tensor, Tensor], Tensor]
WARM_UP_CALLS = 2  # before capture: libraries initialise themselves in their first call


class CudaGraphStep:
    """A decode step captured as a CUDA graph, with static tensors for its inputs."""

    def __init__(self, step: DecodeStep, ids: Tensor, position: int) -> None:
        self.ids, self.position = ids.clone(), torch.tensor(position, device=ids.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # every call writes to the same slot of each cache, so the token is stored once
            for _ in range(WARM_UP_CALLS):
                step(self.ids, self.position)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.states = step(self.ids, self.position)

    def __call__(self, ids: Tensor, position: int) -> Tensor:
        """Replay the graph: ids [B, 1] at a position -> hidden states [B, 1, M]."""
        self.ids.copy_(ids)
        self.position.fill_(position)
        self.graph.replay()
        return self.states.clone()


class SingleQueryAttention(nn.Module):
    """Attention of one query over a rolling KV cache that may not be full yet: empty slots have
    positions before the first visible one. Most fused kernels can't mask them, and one query gains
    nothing from a fused kernel.
    """

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        """-> [B, 1, H, D]."""
        return reference_attention(blocks)


@contextmanager
def fixed_shapes(decoder: Decoder, cache_state: CacheState) -> Iterator[None]:
    """Run decode steps with the same operations on the same memory at every position, as a CUDA
    graph requires.
    """
    cache_state.use_all_slots = True
    try:
        with replace_attention_backends(decoder, lambda layer: SingleQueryAttention()):
            yield
    finally:
        cache_state.use_all_slots = False
