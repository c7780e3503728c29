"""Texts to evaluate a model on: the held-out text of a run, or files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lswt_core.data import Tokens
from lswt_core.errors import DataError
from lswt_core.interfaces import Tokenizer
from lswt_core.plugin_api.seeding import derive_seed


class Text(NamedTuple):
    """Documents of one kind of text."""

    name: str
    documents: Sequence[np.ndarray]  # ids [tokens] of each, the first is BOS
    names: Sequence[str]  # of the documents
    eos_id: int
    # UTF-8 bytes a token of the whole text, of which these documents are a sample
    bytes_per_token: float

    @property
    def tokens(self) -> int:
        """The number of tokens that are scored: every one but BOS, and one EOS a document."""
        return sum(len(ids) for ids in self.documents)

    def labels(self, document: int) -> np.ndarray:
        """The next token of every token of a document, EOS at its end."""
        return np.append(self.documents[document][1:], self.eos_id)


def text_of_tokens(name: str, tokens: Tokens, eos_id: int, limits: Limits) -> Text:
    """Return documents of a tokenised text, chosen by ``limits``."""
    bounds = np.append(tokens.document_starts, len(tokens.ids))

    def read(document: int) -> np.ndarray:
        begin, end = int(bounds[document]), int(bounds[document + 1])
        return np.asarray(tokens.ids[begin : min(end, begin + limits.per_document)], np.int64)

    chosen = list(choose_documents(np.diff(bounds), limits))
    return Text(
        name,
        [read(document) for document in chosen],
        [tokens.names[document] for document in chosen],
        eos_id,
        tokens.n_bytes / len(tokens.ids),
    )


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
    chosen = list(choose_documents(np.array([len(ids) for ids in documents]), limits))
    n_bytes = sum(len(content.encode()) for content in contents.values())
    return Text(
        name,
        [documents[document][: limits.per_document] for document in chosen],
        [list(contents)[document] for document in chosen],
        tokenizer.eos_id,
        n_bytes / sum(len(ids) for ids in documents),
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

    tokens: int  # in all
    per_document: int  # from its beginning


def choose_documents(sizes: np.ndarray, limits: Limits) -> Iterator[int]:
    """Yield documents [sizes in tokens] in an order that depends on their number alone, until
    ``limits.tokens`` are reached: not those that happen to come first.
    """
    left = limits.tokens
    generator = np.random.PCG64(derive_seed(0, "evaluated documents", len(sizes)))
    for document in np.argsort(generator.random_raw(len(sizes)), kind="stable"):
        if left <= 0:
            return
        yield int(document)
        left -= min(int(sizes[document]), limits.per_document)
