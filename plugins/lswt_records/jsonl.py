"""JSON Lines files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from lswt_core.errors import DataError
from lswt_core.interfaces import DataSource, Document
from lswt_core.plugin_api.documents import prompted
from lswt_records.files import Records, missing_key


class JsonLines(Records, DataSource):
    """One JSON object a line, plain or gzipped (.gz); the string in ``field`` is a document. The
    one in ``prompt_field``, if that is given, stands before it, and is read and not predicted.
    Blank lines are skipped.

    ``paths`` lists files, directories (their .jsonl and .jsonl.gz files, at any depth) and glob
    patterns. The validation set is the files listed in ``valid``; without those, every n-th record
    from the first on, n = 1 / ``valid_share``.
    """

    name = "jsonl"
    suffixes = (".jsonl", ".jsonl.gz")

    def __init__(
        self,
        *,
        paths: list[str],
        field: str = "text",
        prompt_field: str | None = None,
        valid: list[str] | None = None,
        valid_share: Annotated[float, Gt(0), Le(0.5)] = 0.03125,
    ) -> None:
        keys = {"field": field, "prompt_field": prompt_field}
        super().__init__(paths, keys, valid, valid_share)

    def records(self, file: Path) -> Iterator[Document]:
        """The records of a file, named file:line."""
        for number, line in read_lines(file):
            if line.strip():
                where = f"{file}:{number}"
                record = parse_json(line, where)
                texts = [text_in(record, option, key, where) for option, key in self.keys.items()]
                yield prompted(where, *texts)

    def file_bytes(self, file: Path) -> int | None:
        """The size of a file, JSON included; None if it is compressed."""
        return None if file.suffix == ".gz" else file.stat().st_size


def text_in(record: Any, option: str, key: str, where: str) -> str:
    """The text of a record under a key, which ``option`` names."""
    text = value_in(record, option, key, where)
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {key!r} is {json.dumps(text)[:40]}, not a string; repair the line or"
            f" set data.{option}"
        )
    return text


def value_in(record: Any, option: str, key: str, where: str) -> Any:
    """What a record has under a key, which ``option`` names."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a JSON {type(record).__name__}, not an object with a field {key!r}; repair"
            " or remove the line"
        )
    if key not in record:
        raise missing_key(where, option, key, list(record))
    return record[key]


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file}:{number + 1}: cannot be read: {error}; replace the file by a complete copy"
        ) from error


def parse_json(line: bytes, where: str) -> Any:
    """The value on a line. Raises DataError unless it is JSON whose strings UTF-8 can encode."""
    try:
        value = json.loads(line.decode().rstrip("\r\n"))
        if b"\\u" in line:  # only escapes can contain an unpaired surrogate
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start} of the line is not UTF-8: {error.reason}; repair or"
            " remove the line"
        ) from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: an escape is an unpaired surrogate, which is not text; repair or remove the"
            " line"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; repair or remove the line"
        ) from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply; repair or remove the line") from error
