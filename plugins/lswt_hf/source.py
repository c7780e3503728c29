"""A HuggingFace data set as a data source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from typing import Annotated, Any, Literal

from annotated_types import Ge

from lswt_core.errors import DataError, PluginError
from lswt_core.interfaces import DataSource, Document
from lswt_core.plugin_api.documents import prompted
from lswt_core.plugin_api.hub import hub_options, summarise_error
from lswt_core.plugin_api.seeding import derive_seed

HELD_OUT = 32  # one row in so many is in the validation set unless it has a split of its own


@dataclass
class Reading:
    """Rows of the library that are being read, and the number of the next one."""

    rows: Any
    number: int


class HuggingFaceData(DataSource):
    """A data set on the Hub, or a local directory of data files; the string in ``column`` of every
    row is a document. The one in ``prompt_column``, if that is given, stands before it, and is read
    and not predicted.

    ``streaming`` downloads and tokenises rows as they are needed. If ``valid_split`` is empty, the
    validation set comes from ``train_split``: rows whose number has a hash divisible by 32 or, when
    streaming, the first ``valid_documents`` rows.
    """

    name = "hf"

    def __init__(
        self,
        *,
        path: str,
        subset: str = "",
        train_split: str = "train",
        valid_split: str = "",
        column: str = "text",
        prompt_column: str | None = None,
        streaming: bool = False,
        valid_documents: Annotated[int, Ge(1)] = 1024,
        revision: str = "",
    ) -> None:
        self.path, self.subset, self.revision = path, subset, revision
        self.train_split, self.valid_split, self.column = train_split, valid_split, column
        self.prompt_column, self.selects_scored = prompt_column, prompt_column is not None
        self.streaming, self.valid_documents = streaming, valid_documents
        self._reading: Reading | None = None  # the data set that is read

    def documents(
        self, split: Literal["train", "valid"], after: Mapping[str, Any] | None = None
    ) -> Iterator[Document]:
        """The rows of a split, in order; those after a ``state()``."""
        source = self.train_split
        if split == "valid" and self.valid_split:
            source = self.valid_split
        for number, row in self._rows(source, after):
            if self.valid_split or self._held_out(number) == (split == "valid"):
                yield self._document(row, f"{source}:{number}")
            elif self.streaming and split == "valid":
                return  # the rest of the stream is for training

    def state(self) -> dict[str, Any] | None:
        """The number of the next row and, when streaming, the library's own state."""
        if self._reading is None:
            return None
        library = self._reading.rows.state_dict() if self.streaming else None
        return {"row": self._reading.number, "library": library}

    def fingerprint(self) -> str:
        """A hash of the texts or, when streaming, of the options."""
        options = [
            self.path,
            self.subset,
            self.revision,
            self.train_split,
            self.valid_split,
            self.column,
            self.valid_documents,
            *([self.prompt_column] if self.prompt_column is not None else []),
        ]
        digest = blake2b(repr(options if self.streaming else "content").encode(), digest_size=16)
        for split in () if self.streaming else ("train", "valid"):
            for document in self.documents(split):
                content = document.text.encode()
                digest.update(f"{split} {document.id} {len(content)} ".encode() + content)
                if document.scored is not None:
                    digest.update(repr(document.scored).encode())
        return digest.hexdigest()

    def _read(
        self, rows: Any, after: Mapping[str, Any] | None
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The rows of a loaded split, numbered, after a ``state()``."""
        begin = 0 if after is None else after["row"]
        if after is not None and self.streaming:
            rows.load_state_dict(after["library"])
        elif after is not None:
            rows = rows.select(range(begin, len(rows)))
        reading = self._reading = Reading(rows, begin)
        for row in rows:
            reading.number += 1
            yield reading.number - 1, row

    def _held_out(self, number: int) -> bool:
        """Whether a row of the training split is in the validation set."""
        if self.streaming:
            return number < self.valid_documents
        return derive_seed(number) % HELD_OUT == 0

    def _document(self, row: Mapping[str, Any], where: str) -> Document:
        """The document of a row."""
        text = self._text(row, "column", self.column, where)
        if self.prompt_column is None:
            return Document(where, text)
        return prompted(where, text, self._text(row, "prompt_column", self.prompt_column, where))

    def _text(self, row: Mapping[str, Any], option: str, column: str, where: str) -> str:
        """The text of a row in a column, which ``option`` names."""
        if column not in row:
            close = get_close_matches(column, row, 1)
            guess = f", perhaps {close[0]!r}" if close else ""
            raise DataError(
                f"data set {self.path!r}, {where}: no column {column!r} among"
                f" {', '.join(map(repr, row))}; set data.{option} to one of them{guess}"
            )
        if not isinstance(row[column], str):
            raise DataError(
                f"data set {self.path!r}, {where}: column {column!r} holds a"
                f" {type(row[column]).__name__}, not a string; set data.{option}"
            )
        return row[column]

    def _rows(
        self, split: str, after: Mapping[str, Any] | None
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The rows of one of the data set's splits, numbered, after a ``state()``."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise PluginError(
                f"data source 'hf' needs the datasets library: {error}; pip install 'datasets>=4'"
            ) from error
        try:
            options = {"streaming": self.streaming, **hub_options(self.revision)}
            rows = load_dataset(self.path, self.subset or None, split=split, **options)
            yield from self._read(rows, after)
        except Exception as error:  # the library and its network client raise errors of any class
            subset = f" ({self.subset})" if self.subset else ""
            raise DataError(
                f"split {split!r} of data set {self.path!r}{subset} cannot be read:"
                f" {summarise_error(error)}\n  fix: check data.path, data.subset and the splits;"
                " without a network set data.path to a local directory, or use other text:"
                " data.use=text (your own files) or data.use=stdlib (Python's standard library,"
                " always available)"
            ) from error
