"""Checks of sources of text, tokenizers and trackers."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import SkipTest

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import Subject
from lswt_core.errors import LswtError
from lswt_core.interfaces import Document, RunInfo

TEXTS = (
    "Hello, world!\n",
    "def f(x):\n\treturn x ** 2  # ½ · naïve — 日本語 🙂\n",
    "",
    "a\n\n\nb   c\t",
)
MOST = 200  # documents looked at


def usable(subject: Subject, *given: Any) -> Any:
    """The component; skips where it lacks a library, a file or a network and says so."""
    try:
        return subject.make(*given)
    except (LswtError, ImportError) as error:
        raise SkipTest(f"it cannot be used here: {error}") from error


@rule(
    "repeatable",
    ("data",),
    why="every epoch and every resumed run reads the documents again, in the same order",
    mend="begin anew at every call of documents(split), in an order that depends on nothing else",
)
def repeatable(subject: Subject) -> None:
    """Documents come again in the same order, splits share none, and the fingerprint stays."""
    source = usable(subject)
    first = {split: list(islice(source.documents(split), MOST)) for split in ("train", "valid")}
    for split, documents in first.items():
        require(documents, f"split {split!r} has no document")
        require(
            all(isinstance(d, Document) for d in documents),
            "documents() must yield Document(id, text)",
        )
        require(
            list(islice(source.documents(split), MOST)) == documents,
            f"asked again, split {split!r} gives other documents",
        )
    shared = set(first["train"]) & set(first["valid"])
    require(not shared, f"{len(shared)} documents are in both splits")
    require(
        source.fingerprint() == subject.make().fingerprint(),
        "two instances have different fingerprints",
    )


@rule(
    "round trip",
    ("tokenizer",),
    why="perplexity per byte and generated text need the text back",
    mend="let decode(encode(text)) be the text; unknown characters need a fallback, e.g. to bytes",
)
def round_trip(subject: Subject) -> None:
    """Text comes back, ids are below size, and two instances agree."""
    tokenizer = usable(subject)
    documents = [Document(str(i), text * 50) for i, text in enumerate(TEXTS)]
    with TemporaryDirectory() as cache:
        other = subject.make()
        for one in (tokenizer, other):
            one.fit(lambda: documents, "test", Path(cache))
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        require(
            all(0 <= i < tokenizer.vocab_size for i in ids),
            f"ids of {text[:12]!r} are not all below size = {tokenizer.vocab_size}",
        )
        require(tokenizer.decode(ids) == text, f"{text!r} comes back as {tokenizer.decode(ids)!r}")
    require(
        0 <= tokenizer.bos_id < tokenizer.vocab_size
        and 0 <= tokenizer.eos_id < tokenizer.vocab_size,
        "begin or end is not below size",
    )
    require(
        tokenizer.fingerprint() == other.fingerprint(), "two instances have different fingerprints"
    )


@rule(
    "pieces",
    ("tokenizer",),
    why="a long text is tokenised piece by piece, and must not become another one by that",
    mend=(
        "cut only where nothing is merged across (lswt_core.plugin_api.tokenizers.pieces does), or"
        " leave pieces() as it is: [text]"
    ),
    after=("round trip",),
)
def in_pieces(subject: Subject) -> None:
    """The ids of a long text's pieces are its own."""
    tokenizer, text = usable(subject), "".join(TEXTS) * 5000
    with TemporaryDirectory() as cache:
        tokenizer.fit(lambda: [Document("0", text[:5000])], "test", Path(cache))
    pieces = list(tokenizer.split_long_text(text))
    require("".join(pieces) == text, "the pieces of a text are not the text")
    ids = [i for of_piece in tokenizer.encode(pieces) for i in of_piece]
    require(
        ids == tokenizer.encode([text])[0],
        f"the ids of a text's {len(pieces)} pieces are not its own",
    )


@rule(
    "records",
    ("tracker",),
    why=(
        "a tracker mirrors a run; it is told of every number, finite or not, also of a run that"
        " goes on"
    ),
    mend="accept any number, write within run.directory, and let close() be called once",
)
def records(subject: Subject) -> None:
    """It takes numbers of a new run and of one that is resumed."""
    with TemporaryDirectory() as directory:
        for resumed in (False, True):
            tracker = usable(
                subject, RunInfo("test", Path(directory), {"train": {"steps": 2}}, resumed)
            )
            tracker.log({"loss": 1.5, "eval/loss": math.nan}, 1)
            tracker.log({"loss": math.inf}, 2)
            tracker.close()
