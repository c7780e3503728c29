"""Reading a token by operations that were recorded once: a GPU is then told what to do by one call
instead of hundreds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lswt_core.decode.rolling_kv_cache import CacheState
from lswt_core.interfaces import KVBlock
from lswt_core.model.attention import replace_attention_backends
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.attention import reference_attention

# ids [B, 1] and the place of them all [] -> states [B, 1, M]
Step = Callable[[Tensor, Tensor], Tensor]
WARM_UP = 2  # calls before a recording: libraries set themselves up in the first


class CudaGraphStep:
    """A step as a CUDA graph: its operations with their memory, in which ids and place are laid
    before it is replayed.
    """

    def __init__(self, step: Step, ids: Tensor, place: int) -> None:
        self.ids, self.place = ids.clone(), torch.tensor(place, device=ids.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # to the same place in every memory, so that nothing is read twice
            for _ in range(WARM_UP):
                step(self.ids, self.place)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.states = step(self.ids, self.place)

    def __call__(self, ids: Tensor, place: int) -> Tensor:
        """The states [B, 1, M] of ids [B, 1] at a place."""
        self.ids.copy_(ids)
        self.place.fill_(place)
        self.graph.replay()
        return self.states.clone()


class OneQuery(nn.Module):
    """Attention of a single token to rings that may not be full yet: keys at places below the
    text's beginning are hidden, for which most fused kernels have no way, and a single query has no
    need of one.
    """

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        """-> [B, 1, H, D]."""
        return reference_attention(parts)


@contextmanager
def alike(decoder: Decoder, clock: CacheState) -> Iterator[None]:
    """While it lasts, a token is read by the same operations and in the same memory wherever it
    stands.
    """
    clock.alike = True
    try:
        with replace_attention_backends(decoder, lambda layer: OneQuery()):
            yield
    finally:
        clock.alike = False
