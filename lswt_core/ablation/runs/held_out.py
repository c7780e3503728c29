"""Evaluation of a finished run: loss on held-out text, by document and by position, isotropy of the
final states, and the share of attention on the first token and on registers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lswt_core.ablation.certificate import Flaw
from lswt_core.ablation.runs.context_probe import probe_context
from lswt_core.data import ContiguousRows
from lswt_core.data.corpus import Corpus, open_corpus, open_held_out
from lswt_core.data.held_out import HeldOut
from lswt_core.data.unigram import unigram_log_probability
from lswt_core.decode.load_run import LoadedModel, load_run
from lswt_core.device import pick_device
from lswt_core.distributed.world import World
from lswt_core.evaluation.activations import mean_cosine
from lswt_core.evaluation.attention_sinks import attention_sinks
from lswt_core.interfaces import IGNORE, Batch
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
    # of ``documents``: summed loss by the unigram model; empty: the training text is a stream
    unigram: Sequence[float] = ()
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
    held_out = HeldOutPass(run.model, text, world.device, log_probability(run.model, corpus))
    return held_out.result()._replace(
        text=corpus.text_fingerprint, flaws=probe_context(run.model, world.device)
    )


def log_probability(model: LoadedModel, corpus: Corpus) -> np.ndarray | None:
    """Return ln p of every id [V] by the unigram model of the training text; None if that is a
    stream.
    """
    if corpus.train is None:
        return None
    size = model.decoder.vocabulary.vocab_size
    return unigram_log_probability(corpus.train, corpus.tokenizer.eos_id, size)


class HeldOutPass:
    """One pass over a held-out text; ``unigram``: ln p of every id [V], if it is known."""

    def __init__(
        self,
        model: LoadedModel,
        text: HeldOut,
        device: torch.device,
        unigram: np.ndarray | None = None,
    ) -> None:
        assert isinstance(text.rows, ContiguousRows), "held-out text is finite"
        self.model, self.text, self.rows, self.device = model, text, text.rows, device
        self.unigram = unigram
        # summed loss, tokens, and summed loss by the unigram model, by document
        self.sums = np.zeros((3, len(text.tokens.document_starts)))
        self.buckets: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(2))
        self.digest = sha256()  # of inputs and labels
        self.cosines: list[float] = []
        self.probes: dict[str, float] = {}

    @torch.no_grad()
    def result(self) -> HeldOutResult:
        """Run the pass and return its results."""
        state = None
        for number in range(self.text.segments):
            self.hash(self.rows.segment())
            batch = self.rows.segment().map(lambda tensor: tensor.to(self.device))
            if number == 0:
                self.probes = self.probe_attention(batch.inputs)
            with self.model.precision.autocast(self.device):
                states, state = self.model.decoder(batch.inputs, state, batch.first_visible)
                score = self.model.decoder.vocabulary.score(states, batch.labels)
            assert score.nll is not None
            self.add(score.nll.cpu().numpy(), batch.labels.cpu().numpy())
            self.cosines.append(mean_cosine(states.float()))
            self.rows.advance()
        return self.summary()

    def hash(self, batch: Batch) -> None:
        """Hash a segment's tokens."""
        for tensor in (batch.inputs, batch.labels):
            self.digest.update(tensor.numpy().tobytes())

    def add(self, nll: np.ndarray, labels: np.ndarray) -> None:
        """Add a segment's losses [B, T] to the sums of documents and of positions; labels [B, T]
        are IGNORE at padding.
        """
        kept = labels != IGNORE
        rows = np.asarray(self.rows.rows)[:, None] * self.rows.length  # [B, 1]
        read = self.rows.cursor + np.arange(nll.shape[1])  # [T] preceding tokens of the row
        # [B, T]
        which = np.searchsorted(self.text.tokens.document_starts, rows + read, side="right") - 1
        # preceding tokens of the same document
        preceding = np.minimum(rows + read - self.text.tokens.document_starts[which], read)
        bucket = np.floor(np.log2(np.maximum(preceding, 1))).astype(int)
        pairs = np.stack((nll, np.ones_like(nll)))[:, kept]  # [2, tokens]
        for sums, values in zip(
            self.sums, (*pairs, self.unigram_losses(labels[kept])), strict=True
        ):
            np.add.at(sums, which[kept], values)
        for one in np.unique(bucket[kept]):
            self.buckets[one] += pairs[:, bucket[kept] == one].sum(1)

    def unigram_losses(self, labels: np.ndarray) -> np.ndarray:
        """Return the loss of every label [N] by the unigram model; zeros if there is none."""
        return np.zeros(len(labels)) if self.unigram is None else -self.unigram[labels]

    def summary(self) -> HeldOutResult:
        """Return the means."""
        total, tokens, _ = self.sums.sum(1)
        names, read = self.text.tokens.names, np.flatnonzero(self.sums[1])
        documents = [(names[int(i)], float(self.sums[0, i]), int(self.sums[1, i])) for i in read]
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
            unigram=[] if self.unigram is None else [float(self.sums[2, i]) for i in read],
        )

    def probe_attention(self, ids: Tensor) -> dict[str, float]:
        """Return attention shares in the first tokens of a text [B, T], averaged over layers."""
        sinks = attention_sinks(self.model, ids[:PROBED_ROWS, :PROBED_TOKENS])
        return {f"attention_{name}": sink.mean for name, sink in sinks.items()}
