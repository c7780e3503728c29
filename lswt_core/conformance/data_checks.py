"""Checks of data sources, tokenizers and trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest import SkipTest

from lswt_core.conformance.check import Violation, require, rule
from lswt_core.conformance.subject import Subject
from lswt_core.data.scored import pieces_of
from lswt_core.errors import DataError, LswtError
from lswt_core.interfaces import DataSource, Document, RunInfo, Tokenizer
from lswt_core.plugin_api.documents import documents_after

TEXTS = (
    "Hello, world!\n",
    "def f(x):\n\treturn x ** 2  # ½ · naïve — 日本語 🙂\n",
    "",
    "a\n\n\nb   c\t",
)
NUMBERS = ("3 14 15 9 2 6", "0 1", "")  # for tokenizers of ids
MAX_DOCUMENTS = 200  # read from each split
FOLLOWING = 20  # documents that are compared after a state


def build_or_skip(subject: Subject, *arguments: Any) -> Any:
    """The component; raises SkipTest if it lacks a library, a file or a network."""
    try:
        return subject.build(*arguments)
    except (LswtError, ImportError) as error:
        raise SkipTest(f"it cannot be used here: {error}") from error


def texts_for(tokenizer: Tokenizer, texts: Sequence[str] = TEXTS) -> Sequence[str]:
    """The texts; NUMBERS for a tokenizer that refuses text, by a DataError."""
    try:
        tokenizer.encode(texts)
    except DataError:
        return NUMBERS
    return texts


@rule(
    "repeatable",
    ("data",),
    why="every epoch and every resumed run reads the documents again, in the same order",
    fix="start over at every call of documents(split), in an order that depends on nothing else",
    after=("interface",),
)
def documents_repeat(subject: Subject) -> None:
    """Documents come again in the same order, splits are disjoint, and the fingerprint stays."""
    source = build_or_skip(subject)
    documents = {}
    for split in ("train", "valid"):
        first, second = (list(islice(source.documents(split), MAX_DOCUMENTS)) for _ in range(2))
        require(first, f"split {split!r} has no document")
        require(
            all(isinstance(document, Document) for document in first),
            "documents() must yield Document(id, text)",
        )
        require(first == second, f"read again, split {split!r} yields other documents")
        documents[split] = {(document.id, document.text) for document in first}
    shared = documents["train"] & documents["valid"]
    require(not shared, f"{len(shared)} documents are in both splits")
    require(
        source.fingerprint() == subject.build().fingerprint(),
        "two instances have different fingerprints",
    )


@rule(
    "scored ranges",
    ("data",),
    why="tokens outside of a document's scored ranges are no labels, and are stored as such",
    fix=(
        "give ranges of characters in order that do not overlap and end at len(text) + 1 at most,"
        " and set selects_scored = True"
    ),
    after=("interface",),
)
def scored_ranges_are_declared(subject: Subject) -> None:
    """Scored ranges lie in their text, and a source that has some says so."""
    source = build_or_skip(subject)
    for split in ("train", "valid"):
        for document in islice(source.documents(split), MAX_DOCUMENTS):
            try:
                pieces = "".join(piece.text for piece in pieces_of(document))
            except DataError as error:
                raise Violation(str(error)) from error
            require(pieces == document.text, f"document {document.id!r} is not its pieces")
            require(
                document.scored is None or source.selects_scored,
                f"document {document.id!r} has scored ranges, and selects_scored is False",
            )


@rule(
    "states",
    ("data",),
    why="a stream is resumed, and token files are completed, from the state of the source",
    fix=(
        "let state() say what documents() has yielded so far, as JSON data, and documents(split,"
        " after=state) yield what comes next; or do not override state()"
    ),
    after=("repeatable",),
)
def documents_go_on_after_a_state(subject: Subject) -> None:
    """From every state, another instance yields the documents that follow."""
    for split in ("train", "valid"):
        read, states = read_with_states(build_or_skip(subject), split)
        for number in sorted({0, 1, len(read) // 2, len(read) - 1} & {*range(len(states))}):
            state = json.loads(json.dumps(states[number]))
            rest = documents_after(subject.build(), split, state)
            expected = read[number + 1 : number + 1 + FOLLOWING]
            require(
                list(islice(rest, len(expected))) == expected,
                f"after the state at document {number} of split {split!r} come other documents",
            )


def read_with_states(
    source: DataSource, split: Literal["train", "valid"]
) -> tuple[list[Document], list[Any]]:
    """Documents of a split and the state after each; nothing where the first has none."""
    read, states = list[Document](), list[Any]()
    for document in islice(source.documents(split), MAX_DOCUMENTS):
        read.append(document)
        states.append(source.state())
        if states[0] is None:
            return [], []
    return read, states


@rule(
    "round trip",
    ("tokenizer",),
    why="perplexity per byte and generated text need the text back",
    fix="let decode(encode(text)) be the text; unknown characters need a fallback, e.g. to bytes",
    after=("interface",),
)
def text_survives(subject: Subject) -> None:
    """Decoding gives the text back, ids are below vocab_size, and two instances agree."""
    tokenizer = build_or_skip(subject)
    other = subject.build()
    documents = [Document(str(i), text * 50) for i, text in enumerate(TEXTS)]
    with TemporaryDirectory() as cache:
        for instance in (tokenizer, other):
            instance.fit(lambda: documents, "test", Path(cache))
    size = tokenizer.vocab_size
    texts = texts_for(tokenizer)
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        require(
            all(0 <= i < size for i in ids),
            f"ids of {text[:12]!r} are not all below vocab_size = {size}",
        )
        decoded = tokenizer.decode(ids)
        require(decoded == text, f"{text!r} is decoded as {decoded!r}")
    for name in ("bos_id", "eos_id"):
        require(0 <= getattr(tokenizer, name) < size, f"{name} is not below vocab_size = {size}")
    require(
        tokenizer.fingerprint() == other.fingerprint(), "two instances have different fingerprints"
    )


@rule(
    "long texts",
    ("tokenizer",),
    why="a long text is tokenised in pieces, which must give the ids of the whole",
    fix=(
        "split only where nothing is merged across (lswt_core.plugin_api.tokenizers.split_long_text"
        " does), or do not override split_long_text"
    ),
    after=("round trip",),
)
def pieces_give_the_same_ids(subject: Subject) -> None:
    """The ids of a long text's pieces, one after the other, are the ids of the text."""
    tokenizer, text = build_or_skip(subject), "".join(TEXTS)
    with TemporaryDirectory() as cache:
        tokenizer.fit(lambda: [Document("0", text * 100)], "test", Path(cache))
    text = " ".join(texts_for(tokenizer, [text])) * 5000
    pieces = list(tokenizer.split_long_text(text))
    require("".join(pieces) == text, "the pieces of a text are not the text")
    ids = []
    for piece_ids in tokenizer.encode(pieces):
        ids.extend(piece_ids)
    require(
        ids == tokenizer.encode([text])[0],
        f"the ids of a text's {len(pieces)} pieces are not the text's",
    )


@rule(
    "metrics",
    ("tracker",),
    why="a tracker mirrors a run: it gets every number, finite or not, also of a resumed run",
    fix="accept any number, write within run.directory, and let close() be called once",
    after=("interface",),
)
def accepts_metrics(subject: Subject) -> None:
    """It accepts the numbers of a new run and of a resumed one."""
    with TemporaryDirectory() as directory:
        for resumed in (False, True):
            run = RunInfo("test", Path(directory), {"train": {"steps": 2}}, resumed)
            tracker = build_or_skip(subject, run)
            tracker.log({"loss": 1.5, "eval/loss": math.nan}, 1)
            tracker.log({"loss": math.inf}, 2)
            tracker.close()
