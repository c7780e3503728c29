"""From a recipe's data and tokenizer tables to rows of training tokens and a held-out text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from lswt_core.assemble import create
from lswt_core.data import Lanes, Prefetched, Rows, Stream, Tokens, cache_directory, check_vocabulary, keyed, tokenise, unigram_perplexity
from lswt_core.errors import DataError, Incompatible
from lswt_core.evaluate import HeldOut
from lswt_core.interfaces import DataSource, Tokenizer
from lswt_core.parallel import World
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

Progress = Callable[[str, int, int, int | None], None]  # what is being done, and how far (see data.tokens.Progress)


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
    """Find the text, learn or load the tokenizer, tokenise once. The first process prepares what the others then find cached."""
    source: DataSource = create(registry, recipe.one("data"))
    if recipe.train.dealing == "in-turn" and not source.streaming:
        raise Incompatible(
            f"train.dealing = 'in-turn' deals the documents of a stream, but data source {source.name!r} does not stream: its text is cut "
            "into equal lanes; leave train.dealing out, or take data.use = 'hf' with data.streaming = true"
        )
    cache, made_by = cache_directory(), (recipe.one("data"), recipe.one("tokenizer"))
    if world.rank > 0:
        world.wait()
    progress("preparing the tokenizer", 0, 0, None)
    tokenizer = fit_tokenizer(recipe, registry, source)
    check_vocabulary(tokenizer, recipe.embedding.vocab_size)
    valid = tokenise(source, tokenizer, "valid", cache, partial(progress, "tokenising held-out text"), made_by)
    train = None
    if not source.streaming:
        train = tokenise(source, tokenizer, "train", cache, partial(progress, "tokenising training text"), made_by)
    if world.rank == 0:
        world.wait()
    world.wait()  # where the others have another cache they prepare the text themselves
    return Corpus(source, tokenizer, train, valid)


def fit_tokenizer(recipe: Recipe, registry: Registry, source: DataSource) -> Tokenizer:
    """The recipe's tokenizer, which has learned from its text, or found in the cache what it learned."""
    tokenizer: Tokenizer = create(registry, recipe.one("tokenizer"))
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
        return Stream(
            corpus.source,
            corpus.tokenizer,
            rows_total=train.rows,
            rows=rows,
            context=train.context,
            documents=train.documents,
            dealing=train.dealing,
            seed=train.seed,
        )
    return Lanes(
        corpus.train,
        corpus.tokenizer.end,
        rows_total=train.rows,
        rows=rows,
        context=train.context,
        seed=train.seed,
        documents=train.documents,
    )


def held_out(recipe: Recipe, corpus: Corpus, world: World, unigram: float) -> HeldOut:
    """The held-out text from its beginning, cut into as many lanes as the recipe asks or as the text allows."""
    context, tokens = recipe.train.context, len(corpus.valid.ids)
    rows = min(recipe.evaluate.rows, tokens // context)
    if rows < 1:
        raise DataError(
            f"the held-out text has {tokens:,} tokens, but evaluation needs a segment of {context}: give it more text, or shorten "
            "train.context"
        )
    segments = max(1, min(tokens // rows, recipe.evaluate.tokens // rows) // context)
    lanes = Lanes(
        corpus.valid,
        corpus.tokenizer.end,
        rows_total=rows,
        rows=world.share(rows),
        context=context,
        seed=0,
        documents=recipe.train.documents,
        shuffle=False,
    )
    return HeldOut(corpus.valid, lanes, segments, unigram)


def unigram(recipe: Recipe, corpus: Corpus) -> float:
    """The held-out perplexity of a model that knows only how frequent tokens are; not a number for a stream."""
    if corpus.train is None:
        return float("nan")
    return unigram_perplexity(corpus.train, corpus.valid, corpus.tokenizer.end, recipe.embedding.vocab_size)
