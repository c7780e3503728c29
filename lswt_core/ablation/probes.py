"""What a finished run is asked: its loss on held-out text, by document and by how much was read,
and how its states and attention look.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lswt_core.data import ContiguousRows
from lswt_core.data.corpus import open_corpus, open_held_out
from lswt_core.data.held_out import HeldOut
from lswt_core.decode.load_run import LoadedModel, load_run
from lswt_core.device import pick_device
from lswt_core.distributed.world import World
from lswt_core.interfaces import IGNORE, AttentionBackend, KVBlock
from lswt_core.model.attention import replaced_attention
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.attention import scores
from lswt_core.registry import Registry

# rows and tokens in which attention is looked at: every weight of them is held at once
PROBED = (4, 512)


class Measured(NamedTuple):
    """What the held-out text says about a model."""

    loss: float  # nats per token
    documents: list[tuple[str, float, int]]  # name, summed loss, tokens
    # first of a bucket of tokens read of the document before, mean loss, tokens
    positions: list[tuple[int, float, int]]
    probes: dict[str, float]


def measure(directory: Path, registry: Registry) -> Measured:
    """Read the held-out text as evaluation does, from a cold start, with memory."""
    run = load_run(directory, registry)
    world = World(device=pick_device(0))
    corpus = open_corpus(run.recipe, registry, world, lambda *_: None)
    return CachedSequence(
        run.model, open_held_out(run.recipe, corpus, world, math.nan), world.device
    ).result()


class CachedSequence:
    """One pass over a held-out text."""

    def __init__(self, model: LoadedModel, text: HeldOut, device: torch.device) -> None:
        assert isinstance(text.rows, ContiguousRows), "held-out text is finite"
        self.model, self.text, self.lanes, self.device = model, text, text.rows, device
        # summed loss and tokens, by document
        self.sums = np.zeros((2, len(text.tokens.document_starts)))
        self.buckets: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
        self.cosines: list[float] = []
        self.probes: dict[str, float] = {}

    @torch.no_grad()
    def result(self) -> Measured:
        """All numbers."""
        state = None
        for number in range(self.text.segments):
            batch = self.lanes.segment().map(lambda tensor: tensor.to(self.device))
            if number == 0:
                self.probes = self.look(batch.inputs)
            with self.model.precision.autocast(self.device):
                states, state = self.model.decoder(batch.inputs, state, batch.first_visible)
                score = self.model.decoder.vocabulary.score(states, batch.labels)
            assert score.nll is not None
            self.count(score.nll.cpu().numpy(), (batch.labels != IGNORE).cpu().numpy())
            self.cosines.append(mean_cosine(states.float()))
            self.lanes.advance()
        return self.summary()

    def count(self, nll: np.ndarray, kept: np.ndarray) -> None:
        """Add a segment's losses [B, T] to their documents and distances."""
        rows = np.asarray(self.lanes.rows)[:, None] * self.lanes.length  # [B, 1]
        read = self.lanes.cursor + np.arange(nll.shape[1])  # [T] tokens of its lane before each
        # [B, T]
        which = np.searchsorted(self.text.tokens.document_starts, rows + read, side="right") - 1
        # tokens of its own document that were read
        seen = np.minimum(rows + read - self.text.tokens.document_starts[which], read)
        bucket = np.floor(np.log2(np.maximum(seen, 1))).astype(int)
        pairs = np.stack((nll, np.ones_like(nll)))[:, kept]  # [2, tokens]
        for sums, found in zip(self.sums, pairs, strict=True):
            np.add.at(sums, which[kept], found)
        for one in np.unique(bucket[kept]):
            self.buckets[one] += pairs[:, bucket[kept] == one].sum(1)

    def summary(self) -> Measured:
        """The sums as means."""
        total, tokens = self.sums.sum(1)
        names = self.text.tokens.names
        documents = [
            (names[i], float(self.sums[0, i]), int(self.sums[1, i]))
            for i in np.flatnonzero(self.sums[1])
        ]
        positions = [
            (2 ** int(one) if one else 0, float(nll / n), int(n))
            for one, (nll, n) in sorted(self.buckets.items())
        ]
        probes = {"isotropy": 1 - sum(self.cosines) / len(self.cosines)} | self.probes
        # a context of one token shows no attention
        seen = {name: value for name, value in probes.items() if math.isfinite(value)}
        return Measured(float(total / tokens), documents, positions, seen)

    def look(self, ids: Tensor) -> dict[str, float]:
        """Where attention goes in the first tokens of a text."""
        with watching(self.model.decoder) as seen, self.model.precision.autocast(self.device):
            self.model.decoder(ids[: PROBED[0], : PROBED[1]])
        return {name: sum(found) / len(found) for name, found in seen.items()}


def mean_cosine(states: Tensor) -> float:
    """The mean cosine between the states [B, T, M] of different tokens of a row; 1 minus it is the
    isotropy that SimCTG reports (Su et al. 2022, arXiv 2202.06417).
    """
    unit = nn.functional.normalize(states, dim=-1)
    size = unit.shape[1]
    pairs = unit.sum(1).square().sum(-1) - size  # [B] sum over ordered pairs of different tokens
    return float(pairs.mean() / max(size * (size - 1), 1))


@contextmanager
def watching(decoder: Decoder) -> Iterator[dict[str, list[float]]]:
    """Note, layer by layer, which share of attention goes to the first token of the text and to
    what has no position.
    """
    seen: defaultdict[str, list[float]] = defaultdict(list)
    with replaced_attention(decoder, lambda layer: Watched(layer.backend, seen)):
        yield seen


class Watched(nn.Module):
    """A backend whose parts are looked at."""

    def __init__(self, backend: AttentionBackend, seen: defaultdict[str, list[float]]) -> None:
        super().__init__()
        self.backend, self.seen = backend, seen

    def forward(self, parts: list[KVBlock]) -> Tensor:
        """What the backend gives."""
        weights = torch.cat([scores(part) for part in parts], dim=-1).softmax(-1)  # [B, H, T, N]
        # the first query sees only itself
        shares = weights[:, :, 1:].mean((0, 1, 2)).split([part.k.shape[1] for part in parts])
        self.seen["attention_first_token"] += [
            float(share[0]) for part, share in zip(parts, shares, strict=True) if part.causal
        ]
        sinks = [
            float(share.sum())
            for part, share in zip(parts, shares, strict=True)
            if part.positions is None
        ]
        if sinks:
            self.seen["attention_registers"].append(sum(sinks))
        found: Tensor = self.backend(parts)
        return found
