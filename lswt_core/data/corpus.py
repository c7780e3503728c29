"""From a recipe's data and tokenizer tables to training rows and a validation set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from lswt_core.data import (
    ContiguousRows,
    PrefetchedRows,
    Rows,
    StreamingRows,
    Tokens,
    cache_directory,
    cache_key,
    check_vocabulary,
    tokenise,
    unigram_perplexity,
)
from lswt_core.data.held_out import HeldOut, choose_held_out
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible
from lswt_core.interfaces import DataSource, Tokenizer
from lswt_core.model.components import build_component
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

# called with what is being done, documents, bytes, and total bytes where known
Progress = Callable[[str, int, int, int | None], None]


class Corpus(NamedTuple):
    """The text of a run."""

    source: DataSource
    tokenizer: Tokenizer
    train: Tokens | None  # None: a stream, tokenised while it is read
    valid: Tokens

    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of data and tokenizer, which a checkpoint is compared with."""
        return {"data": self.source.fingerprint(), "tokenizer": self.tokenizer.fingerprint()}


def open_corpus(recipe: Recipe, registry: Registry, world: World, progress: Progress) -> Corpus:
    """Open the source, fit the tokenizer and tokenise the text, or load all of it from the cache.
    Rank 0 does the work first; the others find it cached.
    """
    source = open_source(recipe, registry)
    if world.rank > 0:
        world.wait()
    progress("preparing the tokenizer", 0, 0, None)
    tokenizer = fit_tokenizer(recipe, registry, source)
    check_vocabulary(tokenizer, recipe.embedding.vocab_size)
    made_by = (recipe.one("data"), recipe.one("tokenizer"))
    cache = cache_directory()
    report = partial(progress, "tokenising held-out text")
    valid = tokenise(source, tokenizer, "valid", cache, report, made_by)
    train = None
    if not source.streaming:
        report = partial(progress, "tokenising training text")
        train = tokenise(source, tokenizer, "train", cache, report, made_by)
    if world.rank == 0:
        world.wait()
    world.wait()  # ranks with a cache of their own may still be tokenising
    return Corpus(source, tokenizer, train, valid)


def open_source(recipe: Recipe, registry: Registry) -> DataSource:
    """The recipe's data source. Raises Incompatible if documents of a finite text are to be
    assigned round-robin.
    """
    source: DataSource = build_component(registry, recipe.one("data"))
    if recipe.train.document_assignment == "round-robin" and not source.streaming:
        raise Incompatible(
            "train.document_assignment = 'round-robin' assigns the documents of a stream, but data"
            f" source {source.name!r} does not stream: its text is cut into contiguous streams of"
            " equal length; leave train.document_assignment out, or take data.use = 'hf' with"
            " data.streaming = true"
        )
    return source


def fit_tokenizer(recipe: Recipe, registry: Registry, source: DataSource) -> Tokenizer:
    """The recipe's tokenizer, trained on the source's text or loaded from the cache."""
    tokenizer: Tokenizer = build_component(registry, recipe.one("tokenizer"))
    key = cache_key(source.fingerprint(), recipe.one("data"), recipe.one("tokenizer"))
    tokenizer.fit(lambda: source.documents("train"), key, cache_directory())
    return tokenizer


def open_training_rows(
    recipe: Recipe, corpus: Corpus, rows: range, device: torch.device, lookahead: int = 0
) -> Rows:
    """Some rows of the global batch of training data, prefetched. ``lookahead``: labels beyond a
    segment that batches hold.
    """
    train = recipe.train
    inner: Rows
    if corpus.train is None:
        inner = StreamingRows(
            corpus.source,
            corpus.tokenizer,
            global_batch_size=train.batch_size,
            rows=rows,
            seq_len=train.seq_len,
            seed=train.seed,
            document_masking=train.document_masking,
            lookahead=lookahead,
            document_assignment=train.document_assignment,
        )
    else:
        inner = ContiguousRows(
            corpus.train,
            corpus.tokenizer.eos_id,
            global_batch_size=train.batch_size,
            rows=rows,
            seq_len=train.seq_len,
            seed=train.seed,
            document_masking=train.document_masking,
            lookahead=lookahead,
        )
    return PrefetchedRows(inner, pin_memory=device.type == "cuda")


def open_held_out(recipe: Recipe, corpus: Corpus, world: World, unigram: float) -> HeldOut:
    """The corpus's validation set at its beginning (``choose_held_out``)."""
    return choose_held_out(recipe, corpus.valid, corpus.tokenizer.eos_id, world, unigram)


def unigram_baseline(recipe: Recipe, corpus: Corpus) -> float:
    """The validation perplexity of the unigram model; NaN for a stream."""
    if corpus.train is None:
        return float("nan")
    return unigram_perplexity(
        corpus.train, corpus.valid, corpus.tokenizer.eos_id, recipe.embedding.vocab_size
    )
