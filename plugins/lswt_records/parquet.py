"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from lswt_core.errors import DataError, PluginError
from lswt_core.interfaces import DataSource, Document
from lswt_records.files import Records, missing_key

ROWS = 256  # read at once


class Parquet(Records, DataSource):
    """Parquet files; the string in ``column`` of every row is a document.

    ``paths`` lists files, directories (their .parquet files, at any depth) and glob patterns. The
    validation set is the files listed in ``valid``; without those, every n-th row from the first
    on, n = 1 / ``valid_share``.
    """

    name = "parquet"
    libraries = ("pyarrow",)
    suffixes = (".parquet",)

    def __init__(
        self,
        *,
        paths: list[str],
        column: str = "text",
        valid: list[str] | None = None,
        valid_share: Annotated[float, Gt(0), Le(0.5)] = 0.03125,
    ) -> None:
        super().__init__(paths, column, valid, valid_share)

    def records(self, file: Path) -> Iterator[Document]:
        """The rows of a file, named file:row."""
        for number, text in enumerate(self._values(file)):
            if not isinstance(text, str):
                raise DataError(
                    f"{file}:{number}: column {self.key!r} holds {text!r:.40}, not a string; repair"
                    " the file or set data.column"
                )
            yield Document(f"{file}:{number}", text)

    def file_bytes(self, file: Path) -> int | None:
        """The uncompressed size of the column; None if the file does not say."""
        try:
            from pyarrow import ArrowException, parquet
        except ImportError:
            return None  # reading the rows says what is wrong
        try:
            metadata = parquet.read_metadata(file)
        except (ArrowException, OSError):
            return None
        columns = [
            metadata.row_group(group).column(number)
            for group in range(metadata.num_row_groups)
            for number in range(metadata.num_columns)
        ]
        return sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema == self.key
        )

    def _values(self, file: Path) -> Iterator[Any]:
        """The values of the column."""
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise PluginError(
                f"data source 'parquet' needs pyarrow: {error}; pip install pyarrow"
            ) from error
        try:
            with parquet.ParquetFile(file) as table:
                if self.key not in table.schema_arrow.names:
                    raise missing_key(str(file), "column", self.key, table.schema_arrow.names)
                for batch in table.iter_batches(ROWS, columns=[self.key]):
                    yield from batch.column(0).to_pylist()
        except (ArrowException, OSError) as error:
            raise DataError(
                f"{file}: cannot be read: {error}; replace the file by a complete copy"
            ) from error
