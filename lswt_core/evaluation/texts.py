"""Texts to evaluate a model on: the held-out text of a run, or files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lswt_core.data import Tokens
from lswt_core.data.corpus import held_out_tokens
from lswt_core.data.scored import as_labels, end_labels, plain_ids
from lswt_core.decode.load_run import LoadedRun
from lswt_core.errors import DataError, UsageError
from lswt_core.interfaces import IGNORE, Tokenizer
from lswt_core.plugin_api.seeding import derive_seed
from lswt_core.registry import Registry

SEGMENTS = 16  # of a document that are read at least, from its beginning


class Whole(NamedTuple):
    """The size of a text of which a part is read."""

    documents: int
    tokens: int
    longest: int  # tokens of a document

    @classmethod
    def of(cls, sizes: np.ndarray) -> Whole:
        """The size of documents [sizes in tokens]."""
        return cls(len(sizes), int(sizes.sum()), int(sizes.max()))


class Text(NamedTuple):
    """Documents of one kind of text."""

    name: str
    documents: Sequence[np.ndarray]  # ids [tokens] of each, the first is BOS
    # [tokens] of each: the next id, EOS at the end, IGNORE where nothing is predicted
    labels: Sequence[np.ndarray]
    names: Sequence[str]  # of the documents
    eos_id: int
    n_bytes: int  # UTF-8 bytes of the tokens that are scored
    whole: Whole  # of which these documents are a part

    @property
    def tokens(self) -> int:
        """The number of tokens that are scored."""
        return sum(int((labels != IGNORE).sum()) for labels in self.labels)

    @property
    def read(self) -> int:
        """The number of tokens that are read."""
        return sum(len(ids) for ids in self.documents)

    @property
    def longest(self) -> int:
        """The tokens of the longest document, up to its last one that is scored."""
        ends = [np.flatnonzero(labels != IGNORE) for labels in self.labels]
        return max(int(end[-1]) + 1 if len(end) else 0 for end in ends)


def text_of_tokens(name: str, tokens: Tokens, tokenizer: Tokenizer, limits: Limits) -> Text:
    """Return documents of a tokenised text, chosen by ``limits``; whole ones where not all of the
    text is scored, because answers may stand at the end. Raises UsageError if nothing is scored.
    """
    bounds = np.append(tokens.document_starts, len(tokens.ids))
    sizes = np.diff(bounds)
    if (tokens.ids[:] < 0).any():
        limits = limits._replace(per_document=int(sizes.max()))
    chosen, size = choose_documents(sizes, limits)
    stored = [
        np.asarray(tokens.ids[int(bounds[document]) : int(bounds[document + 1])])
        for document in chosen
    ]
    labels = [labels_of(one, tokenizer.eos_id)[:size] for one in stored]
    text = Text(
        name,
        [plain_ids(one)[:size] for one in stored],
        labels,
        [tokens.names[document] for document in chosen],
        tokenizer.eos_id,
        scored_bytes(labels, tokenizer),
        Whole.of(sizes),
    )
    if not text.tokens:
        raise UsageError(
            f"none of the {text.read:,} tokens that are read of {name!r} is scored\n"
            "  fix: a larger --tokens, or other data: its answers are what is evaluated"
        )
    return text


def scored_bytes(labels: Sequence[np.ndarray], tokenizer: Tokenizer) -> int:
    """Return the UTF-8 bytes of the scored tokens of documents; the end of one has none."""
    scored = [one[(one != IGNORE) & (one != tokenizer.eos_id)].tolist() for one in labels]
    return sum(len(tokenizer.decode(ids).encode()) for ids in scored)


def held_out_text(run: LoadedRun, registry: Registry, limits: Limits) -> Text:
    """Return the held-out text of a run."""
    tokens = held_out_tokens(run.recipe, registry, run.model.tokenizer)
    return text_of_tokens("held-out", tokens, run.model.tokenizer, limits)


def labels_of(stored: np.ndarray, eos_id: int) -> np.ndarray:
    """Return the labels [tokens] of a document as it is stored, BOS first."""
    return np.append(as_labels(stored[1:]), end_labels(stored[:1], eos_id))


def text_of_files(name: str, path: Path, tokenizer: Tokenizer, limits: Limits) -> Text:
    """Return the text of a file, or of all files below a directory, each one document.

    Raises DataError if there is no text, or a file is not UTF-8.
    """
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    contents = {str(file): read_text(file) for file in files}
    contents = {file: content for file, content in contents.items() if content.strip()}
    if not contents:
        raise DataError(f"--text {path} holds no text to evaluate on\n  fix: name another file")
    encoded = tokenizer.encode(list(contents.values()))
    documents = [np.array([tokenizer.bos_id, *ids], np.int64) for ids in encoded]
    sizes = np.array([len(ids) for ids in documents])
    chosen, size = choose_documents(sizes, limits)
    labels = [labels_of(documents[document], tokenizer.eos_id)[:size] for document in chosen]
    return Text(
        name,
        [documents[document][:size] for document in chosen],
        labels,
        [list(contents)[document] for document in chosen],
        tokenizer.eos_id,
        scored_bytes(labels, tokenizer),
        Whole.of(sizes),
    )


def read_text(path: Path) -> str:
    """Return a file's text; raises DataError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--text: {path} cannot be read as UTF-8: {error}\n  fix: name files of plain text"
        ) from error


class Limits(NamedTuple):
    """How much of a text is read."""

    tokens: int  # in all: documents are added until there are so many
    per_document: int  # from its beginning; more where whole documents have too few in all


def limits_for(tokens: int, seq_len: int, reach: int = 0) -> Limits:
    """Return the limits of a text that is read in segments of ``seq_len``: of every document
    SEGMENTS segments, or two more than the memory or context of ``reach`` tokens that was asked
    for. They depend on no model, so that models are compared on the same tokens.
    """
    return Limits(tokens, max(SEGMENTS * seq_len, 2 * seq_len + reach))


def choose_documents(sizes: np.ndarray, limits: Limits) -> tuple[list[int], int]:
    """Return documents [sizes in tokens], and how many tokens of each are read at most. Their order
    depends on their number alone: not those that happen to come first.
    """
    size = document_limit(sizes, limits)
    read = np.minimum(sizes, size)
    generator = np.random.PCG64(derive_seed(0, "evaluated documents", len(sizes)))
    order = np.argsort(generator.random_raw(len(sizes)), kind="stable")
    before = np.cumsum(read[order]) - read[order]
    return [int(document) for document in order[before < limits.tokens]], size


def document_limit(sizes: np.ndarray, limits: Limits) -> int:
    """Return how many tokens of every document are read: ``per_document``, or the least with which
    all documents together have ``tokens``, as far as they do.
    """
    left = limits.tokens
    for number, size in enumerate(np.sort(sizes)):
        share = math.ceil(left / (len(sizes) - number))
        if share <= size:
            return max(limits.per_document, share)
        left -= int(size)
    return max(limits.per_document, int(sizes.max()))
