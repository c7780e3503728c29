"""Evaluation of a finished run: loss on held-out text, by document and by position, isotropy of the
final states, and the share of attention on the first token and on registers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lswt_core.ablation.certificate import Flaw
from lswt_core.ablation.runs.context_probe import probe_context
from lswt_core.data import ContiguousRows
from lswt_core.data.corpus import Corpus, open_corpus, open_held_out
from lswt_core.data.held_out import HeldOut
from lswt_core.data.unigram import unigram_log_probability
from lswt_core.decode.load_run import LoadedModel, load_run
from lswt_core.device import pick_device
from lswt_core.distributed.world import World
from lswt_core.interfaces import IGNORE, AttentionBackend, Batch, KVBlock
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.attention import attention_scores
from lswt_core.plugin_api.softmax_attention import replace_attention_backends
from lswt_core.registry import Registry

# rows and tokens whose attention is probed: all their attention weights are in memory at once
PROBED_ROWS, PROBED_TOKENS = 4, 512


class HeldOutResult(NamedTuple):
    """Results of a model on the held-out text."""

    loss: float  # nats per token
    documents: list[tuple[str, float, int]]  # name, summed loss, tokens
    # preceding tokens of the document (lower edge of a bucket), mean loss, tokens
    positions: list[tuple[int, float, int]]
    probes: dict[str, float]
    text_hash: str  # of the tokens
    n_bytes: int  # their share of the held-out text, in UTF-8
    unigram_loss: float | None = None  # of their unigram model; None: the training text is a stream
    text: str = ""  # fingerprint of the text by its data source
    flaws: Sequence[Flaw] = ()  # of what the model sees


def evaluate_run(directory: Path, registry: Registry) -> HeldOutResult:
    """Evaluate a run's last checkpoint on its held-out text, as evaluation during training does:
    segment after segment, with the KV cache carried over, cold at the start.
    """
    run = load_run(directory, registry)
    world = World(device=pick_device(0))
    corpus = open_corpus(run.recipe, registry, world, lambda *_: None)
    text = open_held_out(run.recipe, corpus, world, math.nan)
    held_out = HeldOutPass(run.model, text, world.device)
    return held_out.result()._replace(
        unigram_loss=unigram_loss(held_out.label_counts, corpus),
        text=corpus.text_fingerprint,
        flaws=probe_context(run.model, world.device),
    )


def unigram_loss(label_counts: np.ndarray, corpus: Corpus) -> float | None:
    """Return the mean loss of labels, counted by id [V], by the unigram model of the training text;
    None if that is a stream.
    """
    if corpus.train is None:
        return None
    eos, size = corpus.tokenizer.eos_id, len(label_counts)
    log_probability = unigram_log_probability(corpus.train, eos, size)
    return float(-(label_counts @ log_probability) / label_counts.sum())


class HeldOutPass:
    """One pass over a held-out text."""

    def __init__(self, model: LoadedModel, text: HeldOut, device: torch.device) -> None:
        assert isinstance(text.rows, ContiguousRows), "held-out text is finite"
        self.model, self.text, self.rows, self.device = model, text, text.rows, device
        # summed loss and tokens, by document
        self.sums = np.zeros((2, len(text.tokens.document_starts)))
        self.buckets: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
        self.label_counts = np.zeros(model.decoder.vocabulary.vocab_size, dtype=np.int64)  # [V]
        self.digest = sha256()  # of inputs and labels
        self.cosines: list[float] = []
        self.probes: dict[str, float] = {}

    @torch.no_grad()
    def result(self) -> HeldOutResult:
        """Run the pass and return its results."""
        state = None
        for number in range(self.text.segments):
            self.count(self.rows.segment())
            batch = self.rows.segment().map(lambda tensor: tensor.to(self.device))
            if number == 0:
                self.probes = self.probe_attention(batch.inputs)
            with self.model.precision.autocast(self.device):
                states, state = self.model.decoder(batch.inputs, state, batch.first_visible)
                score = self.model.decoder.vocabulary.score(states, batch.labels)
            assert score.nll is not None
            self.add(score.nll.cpu().numpy(), (batch.labels != IGNORE).cpu().numpy())
            self.cosines.append(mean_cosine(states.float()))
            self.rows.advance()
        return self.summary()

    def count(self, batch: Batch) -> None:
        """Count a segment's labels, and hash its tokens."""
        labels = batch.labels[batch.labels != IGNORE].numpy()
        self.label_counts += np.bincount(labels, minlength=len(self.label_counts))
        for tensor in (batch.inputs, batch.labels):
            self.digest.update(tensor.numpy().tobytes())

    def add(self, nll: np.ndarray, kept: np.ndarray) -> None:
        """Add a segment's losses [B, T] to the sums of documents and of positions; ``kept`` is
        False at padding.
        """
        rows = np.asarray(self.rows.rows)[:, None] * self.rows.length  # [B, 1]
        read = self.rows.cursor + np.arange(nll.shape[1])  # [T] preceding tokens of the row
        # [B, T]
        which = np.searchsorted(self.text.tokens.document_starts, rows + read, side="right") - 1
        # preceding tokens of the same document
        preceding = np.minimum(rows + read - self.text.tokens.document_starts[which], read)
        bucket = np.floor(np.log2(np.maximum(preceding, 1))).astype(int)
        pairs = np.stack((nll, np.ones_like(nll)))[:, kept]  # [2, tokens]
        for sums, values in zip(self.sums, pairs, strict=True):
            np.add.at(sums, which[kept], values)
        for one in np.unique(bucket[kept]):
            self.buckets[one] += pairs[:, bucket[kept] == one].sum(1)

    def summary(self) -> HeldOutResult:
        """Return the means."""
        total, tokens = self.sums.sum(1)
        names = self.text.tokens.names
        documents = [
            (names[int(i)], float(self.sums[0, i]), int(self.sums[1, i]))
            for i in np.flatnonzero(self.sums[1])
        ]
        positions = [
            (2 ** int(one) if one else 0, float(nll / n), int(n))
            for one, (nll, n) in sorted(self.buckets.items())
        ]
        probes = {"isotropy": 1 - sum(self.cosines) / len(self.cosines)} | self.probes
        # with a sequence length of one token attention shares are not defined
        finite = {name: value for name, value in probes.items() if math.isfinite(value)}
        whole = self.text.tokens
        return HeldOutResult(
            float(total / tokens),
            documents,
            positions,
            finite,
            text_hash=self.digest.hexdigest(),
            n_bytes=round(tokens * whole.n_bytes / len(whole.ids)),
        )

    def probe_attention(self, ids: Tensor) -> dict[str, float]:
        """Return attention shares in the first tokens of a text [B, T], averaged over layers."""
        autocast = self.model.precision.autocast(self.device)
        with probed_attention(self.model.decoder) as shares, autocast:
            self.model.decoder(ids[:PROBED_ROWS, :PROBED_TOKENS])
        return {name: sum(values) / len(values) for name, values in shares.items()}


def mean_cosine(states: Tensor) -> float:
    """Return the mean cosine similarity of the states [B, T, M] of different tokens of a row; 1
    minus it is the isotropy of SimCTG (Su et al. 2022, arXiv 2202.06417).
    """
    unit = nn.functional.normalize(states, dim=-1)
    size = unit.shape[1]
    pairs = unit.sum(1).square().sum(-1) - size  # [B] sum over ordered pairs of different tokens
    return float(pairs.mean() / max(size * (size - 1), 1))


@contextmanager
def probed_attention(decoder: Decoder) -> Iterator[dict[str, list[float]]]:
    """Record, layer by layer, the share of attention on the first token of the text and on keys
    without positions (registers).
    """
    shares: defaultdict[str, list[float]] = defaultdict(list)
    with replace_attention_backends(decoder, lambda layer: ProbedAttention(layer.backend, shares)):
        yield shares


class ProbedAttention(nn.Module):
    """An attention backend whose attention weights are recorded."""

    def __init__(self, backend: AttentionBackend, shares: defaultdict[str, list[float]]) -> None:
        super().__init__()
        self.backend, self.shares = backend, shares

    def forward(self, blocks: list[KVBlock]) -> Tensor:
        """Return what the backend computes of the key blocks."""
        weights = torch.cat([attention_scores(block) for block in blocks], dim=-1).softmax(
            -1
        )  # [B, H, T, N]
        # without the first query, which attends to itself only
        sizes = [block.k.shape[1] for block in blocks]
        shares = weights[:, :, 1:].mean((0, 1, 2)).split(sizes)
        sinks = []
        for block, share in zip(blocks, shares, strict=True):
            if block.causal:
                self.shares["attention_first_token"].append(float(share[0]))
            if block.positions is None:
                sinks.append(float(share.sum()))
        if sinks:
            self.shares["attention_registers"].append(sum(sinks))
        attended: Tensor = self.backend(blocks)
        return attended
