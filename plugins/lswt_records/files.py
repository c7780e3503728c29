"""Files of records: found, split into training and held-out records, and fingerprinted alike
whatever their format.
"""

from __future__ import annotations

import glob
from abc import abstractmethod
from collections.abc import Iterator
from difflib import get_close_matches
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import ClassVar, Literal

from lswt_core.errors import DataError
from lswt_core.interfaces import DataSource, Document


class Records(DataSource):
    """Documents that stand many in a file, one a record, under one key.

    Held out are the files listed in ``valid``; else every n-th record from the first on, n being 1
    / ``valid_share``.
    """

    suffixes: ClassVar[tuple[str, ...]]  # of the files taken from a directory

    def __init__(
        self, paths: list[str], key: str, valid: list[str] | None, valid_share: float
    ) -> None:
        self.paths, self.key, self.valid, self.valid_share = paths, key, valid, valid_share

    @abstractmethod
    def records(self, file: Path) -> Iterator[Document]:
        """Every record of a file, named file:record."""

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The records of a split, in the order of ``paths``, sorted within each."""
        listed = self.find(self.valid or [])
        if listed:
            files = (
                listed
                if split == "valid"
                else [file for file in self.find(self.paths) if file not in listed]
            )
            yield from (document for file in files for document in self.records(file))
            return
        every = round(1 / self.valid_share)
        for number, document in enumerate(
            document for file in self.find(self.paths) for document in self.records(file)
        ):
            if (number % every == 0) == (split == "valid"):
                yield document

    def fingerprint(self) -> str:
        """A hash of the files, the key and what is held out."""
        listed = self.find(self.valid or [])
        digest = blake2b(f"{self.key!r} {self.valid_share} {len(listed)}".encode(), digest_size=16)
        for file in listed + [file for file in self.find(self.paths) if file not in listed]:
            with file.open("rb") as handle:
                digest.update(file_digest(handle, blake2b).digest())
        return digest.hexdigest()

    def find(self, paths: list[str]) -> list[Path]:
        """The files that files, directories and glob patterns stand for, each once."""
        found: dict[Path, Path] = {}  # by what a path resolves to
        for path in paths:
            place = Path(path).expanduser()
            if place.is_dir():
                matches = [file for file in place.rglob("*") if file.name.endswith(self.suffixes)]
            elif place.is_file() or not glob.has_magic(path):
                matches = [place]
            else:
                matches = list(Path(place.anchor).glob(str(place.relative_to(place.anchor))))
            files = [file for file in sorted(matches) if file.is_file()]
            if not files:
                raise DataError(
                    f"{path!r} names no {self.name} file (looked from {Path.cwd()}): mend"
                    " data.paths or data.valid"
                )
            for file in files:
                found.setdefault(file.resolve(), file)
        return list(found.values())


def missing(where: str, what: str, key: str, present: list[str]) -> DataError:
    """A record has no such key; name those it has, and the nearest."""
    near = get_close_matches(key, present, 1)
    cure = f"set data.{what} to one of them{f', perhaps {near[0]!r}' if near else ''}"
    return DataError(
        f"{where}: no {what} {key!r} among {', '.join(map(repr, present)) or 'none'}; {cure}"
    )
