"""Floating-point operations of a token, counted on the meta device: what the mathematics needs, not
what a kernel happens to do.

Matrix products are counted where they are called, forward and backward; attention's scores are
counted by pairs of a query and a visible key, so that the causal square counts as its triangle, and
remembered keys, into which no gradient flows, count for less.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lswt_core.budget.memory import State
from lswt_core.interfaces import (
    AttentionBackend,
    AttentionRequirements,
    Batch,
    KVBlock,
    Unsupported,
)
from lswt_core.model.attention import Attention, replace_attention_backends
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.attention import reference_attention

PROJECTIONS = "attention projections"
# where it is called: one that is counted has no products
BACKEND = r"Decoder\.blocks\.\d+\.attention\.backend"
PLACES = {
    r"Decoder\.blocks\.\d+\.attention": PROJECTIONS,
    r"Decoder\.blocks\.\d+\.ffn": "feed-forward",
}
SCORES, VOCABULARY = "attention scores", "vocabulary"


class Flops(NamedTuple):
    """Floating-point operations of a token of a warm model; a multiplication and an addition count
    as two.
    """

    forward: dict[str, int]  # by part of the model
    train: int  # forward and backward, what the mathematics needs
    update_curvature: int  # a second-order optimizer's look at the curvature, spread over its steps
    conventional: int  # 3 x forward, as most papers count
    # 6 x parameters, without the embedding table and without attention's scores, as scaling laws
    # count
    six_n: int


def forward_flops(loss: TrainModule, batch: Batch, state: State) -> dict[str, int]:
    """FLOPs of reading a batch and giving all logits, by part of the model; what belongs to no
    layer counts as the vocabulary's.
    """
    # not with no_grad, where it loses its modules
    with counted_attention(loss) as pairs, FlopCounterMode(display=False) as counter:
        loss.decoder.vocabulary.logits(loss.decoder(batch.inputs, state, batch.first_visible)[0])
    found = dict.fromkeys([*PLACES.values(), SCORES, VOCABULARY], 0)
    for name, operations in counter.get_flop_counts().items():
        place = next(
            (place for pattern, place in PLACES.items() if re.fullmatch(pattern, name)), None
        )
        if place:
            found[place] += sum(operations.values())
    found[VOCABULARY] = counter.get_total_flops() - sum(found.values())
    called = sum(
        sum(of.values())
        for name, of in counter.get_flop_counts().items()
        if re.fullmatch(BACKEND, name)
    )
    found[PROJECTIONS] -= called
    found[SCORES] = pairs.forward + called
    return found


def train_flops(loss: TrainModule, batch: Batch, state: State) -> tuple[int, int]:
    """FLOPs of a batch's loss and its gradient; and of these, those of the backward pass, without
    the vocabulary's, which cross-entropy computes ahead.
    """
    with counted_attention(loss) as pairs, FlopCounterMode(display=False) as counter:
        found = loss(batch, state).loss
        ahead = counter.get_total_flops()
        found.backward()
    loss.zero_grad()
    backward = counter.get_total_flops() - ahead + pairs.backward
    return ahead + pairs.forward + backward, backward


def without_auxiliary(loss: TrainModule) -> TrainModule:
    """The same decoder with cross-entropy alone."""
    return TrainModule(loss.decoder, {}, loss.cross_entropy)


class Pairs:
    """FLOPs of attention's scores and weighted sums, from its pairs of query and visible key.

    A pair costs 4 D forward (q . k, and its share of the sum of values) and 8 D backward (the
    gradients of weight, query, key and value, 2 D each), of which 4 D where keys and values take no
    gradient.
    """

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    def add(self, part: KVBlock, window: int | None) -> None:
        """Count a part of a layer with a window; q [B, T, H, D], k [B, N, H, D]."""
        rows, _, heads, width = part.q.shape
        unit = 2 * rows * heads * width * visible_pairs(part, window)
        self.forward += 2 * unit
        # keys are rotated together: theirs do not tell
        self.backward += (4 if part.v.requires_grad else 2) * unit


def visible_pairs(part: KVBlock, window: int | None) -> int:
    """Pairs of a query and a key that it sees; documents are not told on the meta device, and count
    as seen.
    """
    new, keys = part.q.shape[1], part.k.shape[1]
    if window is None or part.positions is None:
        return new * (new + 1) // 2 if part.causal else new * keys
    if part.causal:
        return sum(min(query + 1, window) for query in range(new))
    # the keys right before the segment
    return sum(min(max(window - 1 - query, 0), keys) for query in range(new))


@contextmanager
def counted_attention(loss: TrainModule) -> Iterator[Pairs]:
    """Count instead of attending, where a backend is a way to the softmax; another is called, and
    what it does is counted.
    """
    pairs = Pairs()

    def substitute(layer: Attention) -> nn.Module:
        width = layer.query.out_features // layer.n_heads
        return (
            Counting(pairs, layer.window)
            if attends(layer.backend, layer.n_heads, width)
            else layer.backend
        )

    with replace_attention_backends(loss.decoder, substitute):
        yield pairs


def attends(backend: nn.Module, heads: int, width: int) -> bool:
    """Whether a backend computes the softmax over its parts, found by a small question on the CPU.
    One that has numbers of its own does not; one that says that it does not run there is taken at
    its word.
    """
    if any(True for _ in (*backend.parameters(), *backend.buffers())):
        return False
    try:
        if isinstance(backend, AttentionBackend):
            backend.require(AttentionRequirements("cpu", torch.float32, width))
    except Unsupported:
        return True
    generator = torch.Generator().manual_seed(0)
    q, k, v, old, kept = (
        torch.randn(1, 3, heads, width, generator=generator, device="cpu") for _ in range(5)
    )
    new, positions = (
        KVBlock(q, k, v, True, positions=torch.arange(3, device="cpu")),
        torch.arange(-3, 0, device="cpu"),
    )
    parts = [KVBlock(q, old, kept, False, positions=positions), new]
    try:
        with torch.no_grad():
            return torch.allclose(
                copy.deepcopy(backend)(parts), reference_attention(parts), rtol=0, atol=1e-3
            )
    except Exception:  # what is wrong with it shows where it is called
        return False


class Counting(nn.Module):
    """A backend that counts, and makes something of the right shape that depends on every input,
    without a matrix product.
    """

    def __init__(self, pairs: Pairs, window: int | None) -> None:
        super().__init__()
        self.pairs, self.window = pairs, window

    def forward(self, parts: Sequence[KVBlock]) -> Tensor:
        """-> [B, T, H, D]."""
        found = torch.zeros_like(parts[-1].q)
        for part in parts:
            self.pairs.add(part, self.window)
            found = found + part.q + (part.k + part.v).mean(1, keepdim=True)
        return found
