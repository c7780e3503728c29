"""A HuggingFace data set as a source of documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from hashlib import blake2b
from typing import Annotated, Any, Literal

from annotated_types import Ge

from lswt_core.errors import DataError, PluginError
from lswt_core.interfaces import DataSource, Document
from lswt_core.plugin_api.hub import hub_options, summarise_error
from lswt_core.plugin_api.seeding import derive_seed

SHARE = 32  # one row in so many is held out where no split for it is named


class HuggingFaceData(DataSource):
    """A data set of the Hub, or a local directory of data files; a document is the string in
    ``column``.

    ``streaming`` reads rows as they are needed and tokenises nothing beforehand. Where
    ``valid_split`` is empty, the held-out text comes from ``train_split``: every row whose number's
    hash is divisible by 32 or, of a stream, the first ``valid_documents`` rows, so that evaluation
    need not read far.
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
        streaming: bool = False,
        valid_documents: Annotated[int, Ge(1)] = 1024,
        revision: str = "",
    ) -> None:
        self.path, self.subset, self.revision = path, subset, revision
        self.train_split, self.valid_split, self.column = train_split, valid_split, column
        self.streaming, self.valid_documents = streaming, valid_documents

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The rows of a split, in their order."""
        rows = self.valid_split if split == "valid" and self.valid_split else self.train_split
        for number, row in enumerate(self._rows(rows)):
            if self.valid_split or self._held_out(number) == (split == "valid"):
                yield Document(f"{rows}:{number}", self._text(row, f"{rows}:{number}"))
            elif self.streaming and split == "valid":
                return  # the rest of a stream is for training

    def fingerprint(self) -> str:
        """A hash of the texts; of a stream, which cannot be read for it, a hash of the options."""
        options = [
            self.path,
            self.subset,
            self.revision,
            self.train_split,
            self.valid_split,
            self.column,
            self.valid_documents,
        ]
        digest = blake2b(repr(options if self.streaming else "content").encode(), digest_size=16)
        for split in () if self.streaming else ("train", "valid"):
            for document in self.documents(split):
                content = document.text.encode()
                digest.update(f"{split} {document.id} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def _held_out(self, number: int) -> bool:
        """Is a row of the training split held out, no other split being named for it?"""
        return number < self.valid_documents if self.streaming else derive_seed(number) % SHARE == 0

    def _text(self, row: Mapping[str, Any], where: str) -> str:
        """The text in a row."""
        if self.column not in row:
            near = get_close_matches(self.column, row, 1)
            cure = f"set data.column to one of them{f', perhaps {near[0]!r}' if near else ''}"
            raise DataError(
                f"data set {self.path!r}, {where}: no column {self.column!r} among"
                f" {', '.join(map(repr, row))}; {cure}"
            )
        if not isinstance(row[self.column], str):
            found = type(row[self.column]).__name__
            raise DataError(
                f"data set {self.path!r}, {where}: column {self.column!r} holds a {found}, not a"
                " string; set data.column"
            )
        return row[self.column]

    def _rows(self, split: str) -> Iterator[Mapping[str, Any]]:
        """The rows of one of the data set's own splits."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise PluginError(
                f"data source 'hf' needs the datasets library: {error}; pip install 'datasets>=4'"
            ) from error
        try:
            yield from load_dataset(
                self.path,
                self.subset or None,
                split=split,
                streaming=self.streaming,
                **hub_options(self.revision),
            )
        except Exception as error:  # the library's own and its network client's have no common base
            what = f"split {split!r} of data set {self.path!r}" + (
                f" ({self.subset})" if self.subset else ""
            )
            cure = (
                "check data.path, data.subset and the splits; without a network set data.path to a"
                " local directory, or take other text"
            )
            others = (
                "data.use=text (your own files) or data.use=stdlib (Python's standard library,"
                " always there)"
            )
            raise DataError(
                f"{what} cannot be read: {summarise_error(error)}\n  fix: {cure}: {others}"
            ) from error
