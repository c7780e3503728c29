"""From a recipe's data and tokenizer tables to rows of training tokens and a held-out text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from lswt_core.data import (
    ContiguousRows,
    Prefetched,
    Rows,
    StreamingRows,
    Tokens,
    cache_directory,
    check_vocabulary,
    keyed,
    tokenise,
    unigram_perplexity,
)
from lswt_core.data.held_out import HeldOut
from lswt_core.distributed.world import World
from lswt_core.errors import DataError, Incompatible
from lswt_core.interfaces import DataSource, Tokenizer
from lswt_core.model.components import build_component
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

# what is being done, and how far (see data.tokens.Progress)
Progress = Callable[[str, int, int, int | None], None]


class Corpus(NamedTuple):
    """The text of a run."""

    source: DataSource
    tokenizer: Tokenizer
    train: Tokens | None  # None: a stream, tokenised as it is read
    valid: Tokens

    def fingerprint(self) -> dict[str, str]:
        """What a checkpoint must find again."""
        return {"data": self.source.fingerprint(), "tokenizer": self.tokenizer.fingerprint()}


def open_corpus(recipe: Recipe, registry: Registry, world: World, progress: Progress) -> Corpus:
    """Find the text, learn or load the tokenizer, tokenise once. The first process prepares what
    the others then find cached.
    """
    source: DataSource = build_component(registry, recipe.one("data"))
    if recipe.train.document_assignment == "round-robin" and not source.streaming:
        raise Incompatible(
            "train.document_assignment = 'round-robin' deals the documents of a stream, but data"
            f" source {source.name!r} does not stream: its text is cut into equal lanes; leave"
            " train.document_assignment out, or take data.use = 'hf' with data.streaming = true"
        )
    cache, made_by = cache_directory(), (recipe.one("data"), recipe.one("tokenizer"))
    if world.rank > 0:
        world.wait()
    progress("preparing the tokenizer", 0, 0, None)
    tokenizer = fit_tokenizer(recipe, registry, source)
    check_vocabulary(tokenizer, recipe.embedding.vocab_size)
    valid = tokenise(
        source, tokenizer, "valid", cache, partial(progress, "tokenising held-out text"), made_by
    )
    train = None
    if not source.streaming:
        train = tokenise(
            source,
            tokenizer,
            "train",
            cache,
            partial(progress, "tokenising training text"),
            made_by,
        )
    if world.rank == 0:
        world.wait()
    world.wait()  # where the others have another cache they prepare the text themselves
    return Corpus(source, tokenizer, train, valid)


def fit_tokenizer(recipe: Recipe, registry: Registry, source: DataSource) -> Tokenizer:
    """The recipe's tokenizer, which has learned from its text, or found in the cache what it
    learned.
    """
    tokenizer: Tokenizer = build_component(registry, recipe.one("tokenizer"))
    key = keyed(source.fingerprint(), recipe.one("data"), recipe.one("tokenizer"))
    tokenizer.fit(lambda: source.documents("train"), key, cache_directory())
    return tokenizer


def training_rows(recipe: Recipe, corpus: Corpus, rows: range, device: torch.device) -> Rows:
    """The token streams of some rows of the global batch, read a segment ahead."""
    return Prefetched(rows_of(recipe, corpus, rows), pinned=device.type == "cuda")


def rows_of(recipe: Recipe, corpus: Corpus, rows: range) -> Rows:
    """The same, read when asked."""
    train = recipe.train
    if corpus.train is None:
        return StreamingRows(
            corpus.source,
            corpus.tokenizer,
            global_batch_size=train.batch_size,
            rows=rows,
            seq_len=train.seq_len,
            document_masking=train.document_masking,
            document_assignment=train.document_assignment,
            seed=train.seed,
        )
    return ContiguousRows(
        corpus.train,
        corpus.tokenizer.eos_id,
        global_batch_size=train.batch_size,
        rows=rows,
        seq_len=train.seq_len,
        seed=train.seed,
        document_masking=train.document_masking,
    )


def held_out(recipe: Recipe, corpus: Corpus, world: World, unigram: float) -> HeldOut:
    """The held-out text from its beginning, cut into as many lanes as the recipe asks or as the
    text allows.
    """
    seq_len, tokens = recipe.train.seq_len, len(corpus.valid.ids)
    rows = min(recipe.evaluate.batch_size, tokens // seq_len)
    if rows < 1:
        raise DataError(
            f"the held-out text has {tokens:,} tokens, but evaluation needs a segment of {seq_len}:"
            " give it more text, or shorten train.seq_len"
        )
    segments = max(1, min(tokens // rows, recipe.evaluate.tokens // rows) // seq_len)
    lanes = ContiguousRows(
        corpus.valid,
        corpus.tokenizer.eos_id,
        global_batch_size=rows,
        rows=world.share(rows),
        seq_len=seq_len,
        seed=0,
        document_masking=recipe.train.document_masking,
        shuffle=False,
    )
    return HeldOut(corpus.valid, lanes, segments, unigram)


def unigram(recipe: Recipe, corpus: Corpus) -> float:
    """The held-out perplexity of a model that knows only how frequent tokens are; not a number for
    a stream.
    """
    if corpus.train is None:
        return float("nan")
    return unigram_perplexity(
        corpus.train, corpus.valid, corpus.tokenizer.eos_id, recipe.embedding.vocab_size
    )
