"""FLOPs per token, counted on the meta device: those the mathematics needs, whatever a kernel does.

Matrix products are counted where they are called, forward and backward. Attention scores are
counted by pairs of query and visible key, so that causal attention counts as a triangle, and cached
keys, which take no gradient, cost less in the backward pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lswt_core.budget.batch_memory import State
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Batch,
    FeedForward,
    KVBlock,
    Mixer,
    Unsupported,
)
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.attention import reference_attention
from lswt_core.plugin_api.softmax_attention import SoftmaxAttention, replace_attention_backends

PROJECTIONS, FEED_FORWARD = "attention projections", "feed-forward"
SCORES, VOCABULARY = "attention scores", "vocabulary"


class Flops(NamedTuple):
    """FLOPs per token of a model with full memories; a multiply-add counts as two."""

    forward: dict[str, int]  # by part of the model
    train: int  # forward and backward, what the mathematics needs
    update_curvature: int  # a second-order optimizer's Hessian estimate, averaged over steps
    # matrix products of the optimizer's update (Muon's Newton-Schulz iterations, say), spread over
    # the tokens of a step
    optimizer: int
    conventional: int  # 3 x forward, the convention of most papers
    # 6 x parameters that a token uses, without the embedding table and without attention scores,
    # the convention of scaling laws
    six_n: int


def forward_flops(loss: TrainModule, batch: Batch, state: State) -> dict[str, int]:
    """Return the FLOPs of a forward pass to all logits, by part; what belongs to no layer counts as
    "vocabulary".
    """
    # not under no_grad, where FlopCounterMode does not track modules
    with counted_attention(loss) as pairs, flop_counter() as counter:
        loss.decoder.vocabulary.logits(loss.decoder(batch.inputs, state, batch.first_visible)[0])
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def count(kind: type[nn.Module]) -> int:
        modules = loss.decoder.named_modules(prefix=type(loss.decoder).__name__)
        return sum(counts.get(name, 0) for name, module in modules if isinstance(module, kind))

    # nothing of a backend whose pairs are counted instead
    mixers, backends, ffns = count(Mixer), count(AttentionBackend), count(FeedForward)
    return {
        PROJECTIONS: mixers - backends,
        FEED_FORWARD: ffns,
        SCORES: pairs.forward + backends,
        VOCABULARY: counter.get_total_flops() - mixers - ffns,
    }


def train_flops(loss: TrainModule, batch: Batch, state: State) -> tuple[int, int]:
    """Return the FLOPs of a loss and its gradient, and the share of the backward pass. The gradient
    of the logits counts as forward: cross-entropy computes it there.
    """
    with counted_attention(loss) as pairs, flop_counter() as counter:
        value = loss(batch, state).loss
        forward = counter.get_total_flops()
        value.backward()
    loss.zero_grad()
    backward = counter.get_total_flops() - forward + pairs.backward
    return forward + pairs.forward + backward, backward


def without_auxiliary(loss: TrainModule) -> TrainModule:
    """Return the same decoder with cross-entropy alone."""
    return TrainModule(loss.decoder, {}, loss.cross_entropy)


def flop_counter() -> FlopCounterMode:
    """A counter of operations, of triangular systems too, which torch's leaves out."""
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.linalg_solve_triangular: solver_flops}
    )


def solver_flops(matrix: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """The FLOPs of solving triangular systems: matrices [..., N, N], right-hand sides [..., N, K];
    half of those of a product.
    """
    return math.prod(right) * matrix[-1]


class PairFlops:
    """FLOPs of attention scores and weighted sums, from pairs of a query and a visible key.

    A pair costs 4 D forward (q . k, and its share of the sum of values) and 8 D backward (the
    gradients of weight, query, key and value, 2 D each), of which 4 D if keys and values take no
    gradient.
    """

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    def add(self, block: KVBlock, window: int | None) -> None:
        """Count one key block of a layer; q [B, T, H, D], k [B, N, H, D]."""
        rows, _, heads, width = block.q.shape
        product = 2 * rows * heads * width * visible_pairs(block, window)
        self.forward += 2 * product
        # of v, since keys of all blocks are rotated together and require a gradient together
        self.backward += (4 if block.v.requires_grad else 2) * product


def visible_pairs(block: KVBlock, window: int | None) -> int:
    """Return the pairs of a query and a key that it attends to. Document masks and selections of
    keys have no values on the meta device and are ignored.
    """
    queries, keys = block.q.shape[1], block.k.shape[1]
    if window is None or block.positions is None:
        return queries * (queries + 1) // 2 if block.causal else queries * keys
    if block.causal:
        return sum(min(query + 1, window) for query in range(queries))
    # cached keys, right before the segment
    return sum(min(max(window - 1 - query, 0), keys) for query in range(queries))


@contextmanager
def counted_attention(loss: TrainModule) -> Iterator[PairFlops]:
    """Count pairs instead of attending in every layer whose backend is softmax attention; another
    backend is run, and its operations are counted.
    """
    pairs = PairFlops()

    def substitute(layer: SoftmaxAttention) -> nn.Module:
        if is_softmax_attention(layer.backend, layer.n_heads, layer.n_kv_heads, layer.d_head):
            return CountingAttention(pairs, layer.window)
        return layer.backend

    with replace_attention_backends(loss.decoder, substitute):
        yield pairs


def is_softmax_attention(backend: nn.Module, heads: int, kv_heads: int, d_head: int) -> bool:
    """Return whether a backend computes softmax attention over its key blocks, by comparing it with
    the reference on the CPU. False if it has parameters or buffers; True if it does not run on the
    CPU.
    """
    if any(True for _ in (*backend.parameters(), *backend.buffers())):
        return False
    try:
        if isinstance(backend, AttentionBackend):
            need = AttentionRequirements("cpu", torch.float32, d_head)
            backend.require(need._replace(queries_per_kv=heads // kv_heads))
    except Unsupported:
        return True
    blocks = random_blocks(heads, kv_heads, d_head)
    try:
        with torch.no_grad():
            output = copy.deepcopy(backend)(blocks)
            return torch.allclose(output, reference_attention(blocks), rtol=0, atol=1e-3)
    except Exception:  # its error will show when the backend itself is called
        return False


def random_blocks(heads: int, kv_heads: int, d_head: int) -> list[KVBlock]:
    """Return three cached and three new tokens as key blocks, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, cached_k, cached_v = (
        torch.randn(1, 3, size, d_head, generator=generator, device="cpu")
        for size in (heads, *[kv_heads] * 4)
    )
    cached = torch.arange(-3, 0, device="cpu")
    new = torch.arange(3, device="cpu")
    return [
        KVBlock(q, cached_k, cached_v, False, positions=cached),
        KVBlock(q, k, v, True, positions=new),
    ]


class CountingAttention(nn.Module):
    """A backend that counts pairs and returns an output of the right shape that depends on every
    input, without a matrix product.
    """

    def __init__(self, pairs: PairFlops, window: int | None) -> None:
        super().__init__()
        self.pairs, self.window = pairs, window

    def forward(self, blocks: Sequence[KVBlock]) -> Tensor:
        """-> [B, T, H, D]."""
        output = torch.zeros_like(blocks[-1].q)
        for block in blocks:
            self.pairs.add(block, self.window)
            output = output + block.q + (block.k + block.v).mean((1, 2), keepdim=True)
            if block.bias is not None:
                output = output + block.bias.dense().mean()
        return output
