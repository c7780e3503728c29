"""Parquet files as a source of documents."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from difflib import get_close_matches
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le

from lswt_core.errors import DataError, PluginError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import DataSource, Document

SUFFIXES = (".parquet",)  # of the files taken from a directory
ROWS = 256  # read at a time


class Parquet(DataSource):
    """One document a row: the string in ``column``.

    ``paths`` lists files, directories (their .parquet files, at any depth) and glob patterns. Held out are the files listed in
    ``valid``; else every n-th row from the first on, n being 1 / ``valid_share``.
    """

    name = "parquet"

    def __init__(
        self,
        *,
        paths: list[str],
        column: str = "text",
        valid: list[str] | None = None,
        valid_share: Annotated[float, Gt(0), Le(0.5)] = 0.03125,
    ) -> None:
        self.paths, self.column, self.valid, self.valid_share = paths, column, valid, valid_share

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The rows of a split, in the order of ``paths``, sorted within each."""
        listed = find(self.valid or [])
        if listed:
            files = listed if split == "valid" else [file for file in find(self.paths) if file not in listed]
            yield from self._rows(files)
            return
        every = round(1 / self.valid_share)
        for number, document in enumerate(self._rows(find(self.paths))):
            if (number % every == 0) == (split == "valid"):
                yield document

    def fingerprint(self) -> str:
        """A hash of the files, the column and what is held out."""
        listed = find(self.valid or [])
        digest = blake2b(f"{self.column!r} {self.valid_share} {len(listed)}".encode(), digest_size=16)
        for file in listed + [file for file in find(self.paths) if file not in listed]:
            with file.open("rb") as handle:
                digest.update(file_digest(handle, blake2b).digest())
        return digest.hexdigest()

    def _rows(self, files: list[Path]) -> Iterator[Document]:
        """The rows of some files, named file:row."""
        for file in files:
            for number, text in enumerate(self._values(file)):
                if not isinstance(text, str):
                    cure = "repair the file or set data.column"
                    raise DataError(f"{file}:{number}: column {self.column!r} holds {text!r:.40}, not a string; {cure}")
                yield Document(f"{file}:{number}", text)

    def _values(self, file: Path) -> Iterator[Any]:
        """The column, value by value."""
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise PluginError(f"data source 'parquet' needs pyarrow: {error}; pip install pyarrow") from error
        try:
            with parquet.ParquetFile(file) as table:
                self._check(table.schema_arrow.names, file)
                for batch in table.iter_batches(ROWS, columns=[self.column]):
                    yield from batch.column(0).to_pylist()
        except (ArrowException, OSError) as error:
            raise DataError(f"{file}: cannot be read: {error}; replace the file by a whole copy") from error

    def _check(self, columns: list[str], file: Path) -> None:
        """The column must be there."""
        if self.column not in columns:
            near = get_close_matches(self.column, columns, 1)
            cure = f"set data.column to one of them{f', perhaps {near[0]!r}' if near else ''}"
            raise DataError(f"{file}: no column {self.column!r} among {', '.join(map(repr, columns))}; {cure}")


def find(paths: list[str]) -> list[Path]:
    """The files that files, directories and glob patterns stand for, each once."""
    found: dict[Path, Path] = {}  # by what a path resolves to
    for path in paths:
        place = Path(path).expanduser()
        if place.is_dir():
            matches = [file for file in place.rglob("*") if file.name.endswith(SUFFIXES)]
        elif place.is_file() or not glob.has_magic(path):
            matches = [place]
        else:
            matches = list(Path(place.anchor).glob(str(place.relative_to(place.anchor))))
        files = [file for file in sorted(matches) if file.is_file()]
        if not files:
            raise DataError(f"{path!r} names no Parquet file (looked from {Path.cwd()}): mend data.paths or data.valid")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


@hookimpl
def lswt_components() -> list[type]:
    """Offer Parquet."""
    return [Parquet]
