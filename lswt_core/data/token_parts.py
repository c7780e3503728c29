"""Token files of a text in parts: which documents a file holds, and writing the files that are
missing.

A part is consecutive documents of a split, about PART_CHARACTERS of text; what it holds depends on
the text alone, so that the files are the same whoever writes them, in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lswt_core.data.token_cache import Split, ids_dtype, no_text_message, write_documents
from lswt_core.data.token_file import DamagedError, TokenFileWriter, read_unchecked_header
from lswt_core.errors import DataError
from lswt_core.interfaces import DataSource, Document, Tokenizer
from lswt_core.plugin_api.atomic_write import OTHER_DIRECTORY, explain_write_errors, publish
from lswt_core.plugin_api.documents import documents_after

PART_CHARACTERS = 1 << 25  # of text in a part, at least; a document is never cut
SPLITS: tuple[Split, ...] = ("valid", "train")


class Share(NamedTuple):
    """The parts that a process writes: of every ``of``, the one with ``number`` (from 1)."""

    number: int = 1
    of: int = 1

    @property
    def name(self) -> str:
        """The share as the command line has it."""
        return f"{self.number}/{self.of}"


class Advance(NamedTuple):
    """How far a process has come with a split."""

    split: Split
    documents: int  # that it tokenised
    n_bytes: int  # of their text
    passed: int  # bytes of the split's text, of all shares, before where it is
    total: int | None  # bytes of the split's text; None: not known


class PartedText(NamedTuple):
    """A text, its tokenizer, and the directory of its token files."""

    directory: Path
    source: DataSource
    tokenizer: Tokenizer
    fingerprints: dict[Split, str]  # of the tokens of each split (token_cache.tokens_fingerprint)

    def path(self, split: Split, number: int) -> Path:
        """The token file of a part."""
        return self.directory / f"{split}-{number:05}.bin"


class SplitParts:
    """The parts of a split in a directory."""

    def __init__(self, text: PartedText, split: Split) -> None:
        self.text, self.split = text, split
        self.headers: dict[int, dict[str, Any]] = {}  # of the parts that were seen to be there
        self.count: int | None = None  # how many parts the split has, once its last one was seen

    def header(self, number: int) -> dict[str, Any] | None:
        """The header of a part that is there, None of one that is not. Raises DataError if it is
        of another text, or cut short.
        """
        if number not in self.headers:
            header = read_part_header(self.text.path(self.split, number))
            if header is None:
                return None
            self.check(number, header)
            self.headers[number] = header
            if header["is_last"]:
                self.count = number + 1
        return self.headers[number]

    def check(self, number: int, header: dict[str, Any]) -> None:
        """Raise DataError unless a part is of this text, tokenizer and split."""
        expected = [self.text.fingerprints[self.split], PART_CHARACTERS]
        if [header["fingerprint"], header.get("part_characters")] != expected:
            raise DataError(
                f"{self.text.path(self.split, number)} holds tokens of another text, tokenizer or"
                " split, or of this text before it was changed\n  fix: give another directory with"
                " --out, or remove this one"
            )

    def next_missing(self, begin: int, share: Share) -> int | None:
        """The first part of a share from ``begin`` on that is not there; None beyond the last."""
        number = begin + (share.number - 1 - begin) % share.of
        while self.header(number) is not None:
            number += share.of
        return number if self.count is None or number < self.count else None

    def missing(self) -> list[int] | None:
        """The parts that are not there; None if it is not known how many there are."""
        number = 0
        while self.count is None:
            if self.header(number) is None:
                return None
            number += 1
        return [number for number in range(self.count) if self.header(number) is None]

    def state_before(self, number: int, least: int) -> tuple[int, Any] | None:
        """The latest part from ``least`` + 1 to ``number`` that reading can begin with, and the
        state of the source before it; None if there is none.
        """
        for previous in range(number - 1, least - 1, -1):
            header = self.header(previous)
            if header is not None and header["source_state"] is not None:
                return previous + 1, header["source_state"]
        return None

    def bytes_before(self, number: int) -> int:
        """The bytes of text in all parts before one; those of unknown ones are estimated."""
        known = [self.headers[i]["n_bytes"] for i in range(number) if i in self.headers]
        return sum(known) + (number - len(known)) * PART_CHARACTERS


class PartReader:
    """Reads a split's documents part by part, from the beginning of part ``number``."""

    def __init__(self, source: DataSource, split: Split, number: int, state: Any) -> None:
        self.source, self.number = source, number
        self.state: Any = None  # the source's after the part that was read last, if it has one
        self._documents = documents_after(source, split, state)
        self._next = next(self._documents, None)

    @property
    def is_at_end(self) -> bool:
        """Whether no document is left."""
        return self._next is None

    def part(self) -> Iterator[Document]:
        """The documents of the next part."""
        characters = 0
        while self._next is not None and characters < PART_CHARACTERS:
            document = self._next
            characters += max(1, len(document.text))
            if characters >= PART_CHARACTERS:
                self.state = self.source.state()  # before the first document of the next part
            yield document
            self._next = next(self._documents, None)
        self.number += 1

    def place(self) -> dict[str, Any]:
        """Where it stands after a part, for the part's header."""
        return {
            "is_last": self.is_at_end,
            "source_state": None if self.is_at_end else self.state,
        }

    def skip_to(self, number: int) -> None:
        """Read on to a part, or to the end."""
        while self.number < number and not self.is_at_end:
            for _ in self.part():
                pass


def write_missing_parts(
    parts: SplitParts, share: Share, working: Path, report: Callable[[Advance], None]
) -> None:
    """Write a share's parts of a split that are not there. Files are written in the directory
    ``working``, which no other process uses, and moved when they are complete. Raises DataError for
    a split without text.
    """
    reader: PartReader | None = None
    totals = Totals(parts, report)
    number = parts.next_missing(0, share)
    while number is not None:
        later = parts.state_before(number, 0 if reader is None else reader.number)
        if reader is None or later is not None:
            reader = PartReader(parts.text.source, parts.split, *(later or (0, None)))
        reader.skip_to(number)
        if reader.is_at_end:
            parts.count = reader.number
            break
        write_part(parts, reader, working, totals)
        number = parts.next_missing(number + 1, share)
    if parts.missing() == [] and not any(part["tokens"] for part in parts.headers.values()):
        empty = sum(part["n_empty"] for part in parts.headers.values())
        raise DataError(no_text_message(parts.text.source, parts.split, empty))


class Totals:
    """Adds up what a process has tokenised of a split."""

    def __init__(self, parts: SplitParts, report: Callable[[Advance], None]) -> None:
        self.parts, self.report = parts, report
        self.documents = self.n_bytes = 0
        self.total = parts.text.source.n_bytes(parts.split)
        report(Advance(parts.split, 0, 0, 0, self.total))

    def within(self, number: int, documents: int, n_bytes: int) -> None:
        """Report the progress within a part."""
        passed = self.parts.bytes_before(number) + n_bytes
        done = (self.documents + documents, self.n_bytes + n_bytes)
        self.report(Advance(self.parts.split, *done, passed, self.total))

    def add(self, documents: int, n_bytes: int) -> None:
        """Add a part that is written."""
        self.documents += documents
        self.n_bytes += n_bytes


def write_part(parts: SplitParts, reader: PartReader, working: Path, totals: Totals) -> None:
    """Tokenise the reader's next part into its file."""
    number, text = reader.number, parts.text
    path = text.path(parts.split, number)
    temporary = working / path.name
    with explain_write_errors(temporary, OTHER_DIRECTORY):
        file = temporary.open("wb")
    with file:
        writer = TokenFileWriter(file, ids_dtype(text.tokenizer, text.source), OTHER_DIRECTORY)
        n_bytes, n_empty = write_documents(
            writer,
            reader.part(),
            text.tokenizer,
            lambda documents, size: totals.within(number, documents, size),
        )
        about = {"part_characters": PART_CHARACTERS, **reader.place()}
        writer.finish(text.fingerprints[parts.split], n_bytes, n_empty, **about)
        publish(file, temporary, path, OTHER_DIRECTORY)
    parts.header(number)
    totals.add(len(writer.names) + n_empty, n_bytes)


def read_part_header(path: Path) -> dict[str, Any] | None:
    """The header of a token file; None if there is none. Raises DataError if it is damaged or
    cannot be read.
    """
    try:
        with path.open("rb") as file:
            return read_unchecked_header(file)[0]
    except FileNotFoundError:
        return None
    except DamagedError as damage:
        raise DataError(
            f"{path} {damage}: copy it again, or remove it, and run the same tokenize command again"
        ) from damage
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
