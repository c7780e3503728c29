"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from lswt_core.errors import DataError, PluginError
from lswt_core.interfaces import DataSource, Document
from lswt_core.plugin_api.documents import prompted
from lswt_records.files import Records, missing_key

ROWS = 256  # read at once


class Parquet(Records, DataSource):
    """Parquet files; the string in ``column`` of every row is a document. The one in
    ``prompt_column``, if that is given, stands before it, and is read and not predicted.

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
        prompt_column: str | None = None,
        valid: list[str] | None = None,
        valid_share: Annotated[float, Gt(0), Le(0.5)] = 0.03125,
    ) -> None:
        keys = {"column": column, "prompt_column": prompt_column}
        super().__init__(paths, keys, valid, valid_share)

    def records(self, file: Path) -> Iterator[Document]:
        """The rows of a file, named file:row."""
        for number, texts in enumerate(self._values(file)):
            for (option, key), text in zip(self.keys.items(), texts, strict=True):
                if not isinstance(text, str):
                    raise DataError(
                        f"{file}:{number}: column {key!r} holds {text!r:.40}, not a string; repair"
                        f" the file or set data.{option}"
                    )
            yield prompted(f"{file}:{number}", *texts)

    def file_bytes(self, file: Path) -> int | None:
        """The uncompressed size of the columns; None if the file does not say."""
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
            if column.path_in_schema in self.keys.values()
        )

    def _values(self, file: Path) -> Iterator[tuple[Any, ...]]:
        """The values of the columns, row by row."""
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise PluginError(
                f"data source 'parquet' needs pyarrow: {error}; pip install pyarrow"
            ) from error
        try:
            with parquet.ParquetFile(file) as table:
                for option, key in self.keys.items():
                    if key not in table.schema_arrow.names:
                        raise missing_key(str(file), option, key, table.schema_arrow.names)
                keys = [*self.keys.values()]
                for batch in table.iter_batches(ROWS, columns=keys):
                    yield from zip(*(batch.column(key).to_pylist() for key in keys), strict=True)
        except (ArrowException, OSError) as error:
            raise DataError(
                f"{file}: cannot be read: {error}; replace the file by a complete copy"
            ) from error
