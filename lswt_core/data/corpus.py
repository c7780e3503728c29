"""From a recipe's data and tokenizer tables to training rows and a validation set."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
from lswt_core.data.nodes import count_nodes
from lswt_core.data.token_directory import TokenDirectory, token_path, tokenizer_cache
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible
from lswt_core.interfaces import DataSource, Tokenizer
from lswt_core.model.components import build_component
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

logger = logging.getLogger(__name__)

# called with what is being done, documents, bytes, and total bytes where known
Progress = Callable[[str, int, int, int | None], None]


class Corpus(NamedTuple):
    """The text of a run."""

    source: DataSource
    tokenizer: Tokenizer
    train: Tokens | None  # None: a stream, tokenised while it is read
    valid: Tokens
    text_fingerprint: str  # the source's

    def fingerprint(self) -> dict[str, str]:
        """Fingerprints of data and tokenizer, which a checkpoint is compared with."""
        return {"data": self.text_fingerprint, "tokenizer": self.tokenizer.fingerprint()}


def open_corpus(recipe: Recipe, registry: Registry, world: World, progress: Progress) -> Corpus:
    """Open the source, fit the tokenizer and open the text's token files; without such, tokenise
    the text, or load all of it from the cache. Rank 0 does the work first; the others find it
    cached.
    """
    files = open_token_directory(recipe)
    source = open_source(recipe, registry)
    if world.rank > 0:
        world.wait()
    progress("preparing the tokenizer", 0, 0, None)
    text = source.fingerprint() if files is None else files.text
    tokenizer = fit_tokenizer(recipe, registry, source, text, tokenizer_cache(recipe))
    check_vocabulary(tokenizer, recipe.embedding.vocab_size)
    if files is not None:
        return open_token_files(files, source, tokenizer, world, progress)
    train, valid = tokenise_into_cache(recipe, source, tokenizer, progress)
    if source.streaming and world.rank == 0:
        warn_of_many_nodes(source)
    if world.rank == 0:
        world.wait()
    world.wait()  # ranks with a cache of their own may still be tokenising
    return Corpus(source, tokenizer, train, valid, text)


def tokenise_into_cache(
    recipe: Recipe, source: DataSource, tokenizer: Tokenizer, progress: Progress
) -> tuple[Tokens | None, Tokens]:
    """The training text, None if it is a stream, and the held-out text."""
    made_by, cache = (recipe.one("data"), recipe.one("tokenizer")), cache_directory()
    report = partial(progress, "tokenising held-out text")
    valid = tokenise(source, tokenizer, "valid", cache, report, made_by)
    if source.streaming:
        return None, valid
    report = partial(progress, "tokenising training text")
    return tokenise(source, tokenizer, "train", cache, report, made_by), valid


def held_out_tokens(recipe: Recipe, registry: Registry, tokenizer: Tokenizer) -> Tokens:
    """The held-out text alone, for a model that is trained."""
    files = open_token_directory(recipe)
    if files is not None:
        files.check_tokenizer(tokenizer)
        return files.tokens("valid")
    made_by = (recipe.one("data"), recipe.one("tokenizer"))
    source = open_source(recipe, registry)
    return tokenise(source, tokenizer, "valid", cache_directory(), made_by=made_by)


def open_token_files(
    files: TokenDirectory,
    source: DataSource,
    tokenizer: Tokenizer,
    world: World,
    progress: Progress,
) -> Corpus:
    """The text in a directory of token files. Every rank checks its share of the files' contents;
    rank 0 checks that the text has not changed.
    """
    if world.rank == 0:
        world.wait()
    files.check_tokenizer(tokenizer)
    progress("checking token files", 0, 0, None)
    if world.rank == 0:
        files.check_text(source)
    files.check_share(world.rank, world.size)
    world.wait()
    train, valid = files.tokens("train"), files.tokens("valid")
    return Corpus(source, tokenizer, train, valid, files.text)


def open_token_directory(recipe: Recipe) -> TokenDirectory | None:
    """The directory that data.token_directory names; None if it names none."""
    given = recipe.one("data").token_directory
    if given is None:
        return None
    return TokenDirectory(token_path(given), (recipe.one("data"), recipe.one("tokenizer")))


def warn_of_many_nodes(source: DataSource) -> None:
    """Log that a stream is read on every machine, where there are several."""
    nodes = count_nodes(os.environ)
    if nodes > 1:
        logger.warning(
            "data source %r streams: each of %d machines reads and tokenises the whole stream. For"
            " so many, tokenise the text once (python -m lswt_core tokenize RECIPE --out DIR) and"
            " set data.token_directory",
            source.name,
            nodes,
        )


def open_source(recipe: Recipe, registry: Registry) -> DataSource:
    """The recipe's data source. Raises Incompatible if documents of a finite text are to be
    assigned round-robin, or documents are made for another sequence length.
    """
    source: DataSource = build_component(registry, recipe.one("data"))
    require_segment_length(recipe, source)
    tokenised = recipe.one("data").token_directory is not None
    if recipe.train.document_assignment == "round-robin" and (tokenised or not source.streaming):
        why = "is read from token files" if tokenised else "does not stream"
        raise Incompatible(
            "train.document_assignment = 'round-robin' assigns the documents of a stream, but data"
            f" source {source.name!r} {why}: its text is cut into contiguous streams of"
            " equal length; leave train.document_assignment out, or take data.use = 'hf' with"
            " data.streaming = true and no data.token_directory"
        )
    return source


def require_segment_length(recipe: Recipe, source: DataSource) -> None:
    """Raise Incompatible, with the places of the source and of those inside of it, if it makes
    documents for another sequence length.
    """
    if source.segment_length in (None, recipe.train.seq_len):
        return
    places = [
        f"\n  --> {recipe.explain(f'{chosen.table}.use')[-1][1].where}   [{chosen.table}]"
        f" {chosen.name}"
        for chosen in recipe.one("data").with_inner()
    ]
    raise Incompatible(
        f"data source {source.name!r} makes documents for segments of {source.segment_length}"
        f" tokens, and train.seq_len is {recipe.train.seq_len}: set one to the other"
        + "".join(places)
    )


def text_fingerprint(recipe: Recipe, source: DataSource) -> str:
    """The fingerprint of a recipe's text: as its token files have it, else the source's."""
    files = open_token_directory(recipe)
    return source.fingerprint() if files is None else files.text


def fit_tokenizer(
    recipe: Recipe, registry: Registry, source: DataSource, text: str, cache: Path
) -> Tokenizer:
    """The recipe's tokenizer, trained on the source's text, whose fingerprint is ``text``, or
    loaded from a cache.
    """
    tokenizer: Tokenizer = build_component(registry, recipe.one("tokenizer"))
    key = cache_key(text, recipe.one("data"), recipe.one("tokenizer"))
    tokenizer.fit(lambda: source.documents("train"), key, cache)
    return tokenizer


def open_training_rows(recipe: Recipe, corpus: Corpus, world: World, lookahead: int = 0) -> Rows:
    """Rows of this rank, of the global batch of training data, prefetched; all ranks call this.
    ``lookahead``: labels beyond a segment that batches hold.
    """
    train = recipe.train
    rows = world.rows(train.batch_size)
    inner: Rows
    if corpus.train is None:
        inner = open_stream(recipe, corpus, world, lookahead)
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
            whole_documents=corpus.source.segment_length is not None,
        )
    return PrefetchedRows(inner, pin_memory=world.device.type == "cuda")


def open_stream(recipe: Recipe, corpus: Corpus, world: World, lookahead: int) -> Rows:
    """Rows of this rank, of a stream that one rank of each machine reads."""
    train = recipe.train
    inner = StreamingRows(
        corpus.source,
        corpus.tokenizer,
        global_batch_size=train.batch_size,
        rows=world.rows(train.batch_size),
        seq_len=train.seq_len,
        seed=train.seed,
        document_masking=train.document_masking,
        lookahead=lookahead,
        document_assignment=train.document_assignment,
    )
    if world.size == 1:
        return inner
    from lswt_core.data.shared_stream import SharedStream
    from lswt_core.distributed.node import Node

    node = Node.find(world)
    rows = [world._replace(rank=rank).rows(train.batch_size) for rank in node.ranks]
    return SharedStream(inner, node, rows)


def open_held_out(recipe: Recipe, corpus: Corpus, world: World, unigram: float) -> HeldOut:
    """The corpus's validation set at its beginning (``choose_held_out``)."""
    return choose_held_out(
        recipe,
        corpus.valid,
        corpus.tokenizer.eos_id,
        world,
        unigram,
        whole_documents=corpus.source.segment_length is not None,
    )


def unigram_baseline(recipe: Recipe, corpus: Corpus) -> float:
    """The validation perplexity of the unigram model; NaN for a stream."""
    if corpus.train is None:
        return float("nan")
    return unigram_perplexity(
        corpus.train, corpus.valid, corpus.tokenizer.eos_id, recipe.embedding.vocab_size
    )
