"""Checks of the fingerprints of data sources and tokenizers, and of the order of documents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.data_checks import TEXTS, build_or_skip, texts_for
from lswt_core.conformance.fresh_process import digests, report_of
from lswt_core.conformance.option_variants import option_variants
from lswt_core.conformance.subject import Subject
from lswt_core.errors import LswtError
from lswt_core.interfaces import DataSource, Document, Tokenizer

DOCUMENTS = 50  # of each split and variant: what an option changes is among the first
OTHER_TEXTS = ("Quite another text, with other words.\n", "12345 67890 " * 20, "ŵŷ" * 30)


@rule(
    "order",
    ("data",),
    why="a run that is resumed in another process must go on with the document that comes next",
    fix="sort what comes from sets, dictionaries of hashes, directories and threads",
    after=("repeatable",),
)
def order_is_the_same_in_every_process(subject: Subject) -> None:
    """Another process, in which sets have another order, reads the same documents."""
    own = digests(build_or_skip(subject))
    other = report_of(subject)["documents"]
    different = [name for name in own if own[name] != other[name]]
    require(not different, f"another process has another {', '.join(different)}")


@rule(
    "fingerprint",
    ("data", "tokenizer"),
    why="tokenised texts and trained tokenizers are cached under it: an old one would be used",
    fix="hash all that the documents, or the ids, follow from: contents and options",
    after=("repeatable", "round trip"),
)
def fingerprint_follows_the_content(subject: Subject) -> None:
    """Whatever changes documents or ids changes the fingerprint."""
    outcome, fingerprint = observe(build_or_skip(subject), TEXTS)
    with TemporaryDirectory() as directory:
        for change, other_outcome, other in variants(subject, Path(directory)):
            same = other_outcome == outcome or other != fingerprint
            require(same, f"{change} changes what it yields, and the fingerprint stays")


def variants(subject: Subject, directory: Path) -> Iterator[tuple[str, Any, str]]:
    """What changed, and what the changed component yields, with its fingerprint."""
    if subject.kind == "tokenizer":
        yield "training on other documents", *observe(subject.build(), OTHER_TEXTS)
    for change, variant in option_variants(subject, directory):
        try:
            yield change, *observe(variant.build(), TEXTS)
        except (LswtError, ImportError, OSError, ValueError):
            continue  # it does not accept this


def observe(component: DataSource | Tokenizer, texts: tuple[str, ...]) -> tuple[Any, str]:
    """The documents of a source, or the ids of a tokenizer trained on some texts, and the
    fingerprint.
    """
    if isinstance(component, DataSource):
        splits: tuple[Any, ...] = ("train", "valid")
        read = [list(islice(component.documents(split), DOCUMENTS)) for split in splits]
        return read, component.fingerprint()
    documents = [Document(str(i), text * 50) for i, text in enumerate(texts)]
    with TemporaryDirectory() as cache:
        component.fit(lambda: documents, str(hash(texts)), Path(cache))
    return component.encode(texts_for(component)), component.fingerprint()


@rule(
    "special tokens",
    ("tokenizer",),
    why="a document begins where its first id is BOS, and generation ends at EOS",
    fix="give BOS and EOS ids of their own, which no text is encoded as",
    after=("round trip",),
)
def texts_have_no_special_ids(subject: Subject) -> None:
    """No text has the ids of BOS and EOS."""
    tokenizer = build_or_skip(subject)
    every_byte = bytes(range(128)).decode()
    texts = [*TEXTS, every_byte, "".join(map(chr, range(128, 2048)))]
    with TemporaryDirectory() as cache:
        tokenizer.fit(lambda: [Document("0", text) for text in texts], "test", Path(cache))
    ids = {i for encoded in tokenizer.encode(texts_for(tokenizer, texts)) for i in encoded}
    for name in ("bos_id", "eos_id"):
        special = getattr(tokenizer, name)
        require(special not in ids, f"{name} = {special} is also the id of a text's token")
