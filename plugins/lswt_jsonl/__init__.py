"""JSON Lines files as a source of documents."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le

from lswt_core.errors import DataError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import DataSource, Document

SUFFIXES = (".jsonl", ".jsonl.gz")  # of the files taken from a directory


class JsonLines(DataSource):
    """One JSON object a line, plain or gzipped (.gz); a document is the string in ``field``. Blank lines are nothing.

    ``paths`` lists files, directories (their .jsonl and .jsonl.gz files, at any depth) and glob patterns. Held out are the
    files listed in ``valid``; else every n-th record from the first on, n being 1 / ``valid_share``.
    """

    name = "jsonl"

    def __init__(
        self,
        *,
        paths: list[str],
        field: str = "text",
        valid: list[str] | None = None,
        valid_share: Annotated[float, Gt(0), Le(0.5)] = 0.03125,
    ) -> None:
        self.paths, self.field, self.valid, self.valid_share = paths, field, valid, valid_share

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The records of a split, in the order of ``paths``, sorted within each."""
        listed = find(self.valid or [])
        if listed:
            files = listed if split == "valid" else [file for file in find(self.paths) if file not in listed]
            yield from self._records(files)
            return
        every = round(1 / self.valid_share)
        for number, document in enumerate(self._records(find(self.paths))):
            if (number % every == 0) == (split == "valid"):
                yield document

    def fingerprint(self) -> str:
        """A hash of the files, the field and what is held out."""
        listed = find(self.valid or [])
        digest = blake2b(f"{self.field!r} {self.valid_share} {len(listed)}".encode(), digest_size=16)
        for file in listed + [file for file in find(self.paths) if file not in listed]:
            with file.open("rb") as handle:
                digest.update(file_digest(handle, blake2b).digest())
        return digest.hexdigest()

    def _records(self, files: list[Path]) -> Iterator[Document]:
        """The records of some files, named file:line."""
        for file in files:
            for number, line in lines(file):
                if line.strip():
                    where = f"{file}:{number}"
                    yield Document(where, self._text(parse(line, where), where))

    def _text(self, record: Any, where: str) -> str:
        """The text in a record."""
        if not isinstance(record, dict):
            raise DataError(f"{where}: a JSON {type(record).__name__} where an object with a field {self.field!r} is needed")
        if self.field not in record:
            near = get_close_matches(self.field, record, 1)
            cure = f"set data.field to one of them{f', perhaps {near[0]!r}' if near else ''}"
            raise DataError(f"{where}: no field {self.field!r} among {', '.join(map(repr, record)) or 'none'}; {cure}")
        text = record[self.field]
        if not isinstance(text, str):
            raise DataError(f"{where}: field {self.field!r} is {json.dumps(text)[:40]}, not a string; repair the line or set data.field")
        return text


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
            raise DataError(f"{path!r} names no JSON Lines file (looked from {Path.cwd()}): mend data.paths or data.valid")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}:{number + 1}: cannot be read: {error}; replace the file by a whole copy") from error


def parse(line: bytes, where: str) -> Any:
    """The value on a line; all its characters must be ones that UTF-8 can write."""
    try:
        value = json.loads(line.decode().rstrip("\r\n"))
        if b"\\u" in line:  # only an escape can smuggle in half a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} of the line is not UTF-8: {error.reason}; repair or remove the line") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: an escape stands for half a surrogate pair, which is no text; repair or remove the line") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON: {error.msg} at column {error.colno}; repair or remove the line") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deep; repair or remove the line") from error


@hookimpl
def lswt_components() -> list[type]:
    """Offer JSON Lines."""
    return [JsonLines]
