"""Files of records in any format: finding them, the validation split, the fingerprint."""

from __future__ import annotations

import glob
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import ClassVar, Literal

from lswt_core.errors import DataError
from lswt_core.interfaces import DataSource, Document


class Records(DataSource):
    """Files with many documents, one per record. ``keys`` are the keys of a record that a document
    is made of, by the option that names them: of what it is and, where that is not None, of the
    prompt before it.

    The validation set is the files listed in ``valid``; without those, every n-th record from the
    first on, n = 1 / ``valid_share``.
    """

    suffixes: ClassVar[tuple[str, ...]]  # of the files to read in a directory

    def __init__(
        self,
        paths: list[str],
        keys: Mapping[str, str | None],
        valid: list[str] | None,
        valid_share: float,
    ) -> None:
        self.paths, self.valid, self.valid_share = paths, valid, valid_share
        self.keys = {option: key for option, key in keys.items() if key is not None}
        self.selects_scored = len(self.keys) > 1  # a prompt is read and not predicted

    @abstractmethod
    def records(self, file: Path) -> Iterator[Document]:
        """Every record of a file, named file:record."""

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The records of a split, in the order of ``paths``, sorted within each."""
        valid_files = self.find(self.valid or [])
        if valid_files and split == "valid":
            yield from self.read(valid_files)
        elif valid_files:
            yield from self.read(file for file in self.find(self.paths) if file not in valid_files)
        else:
            every = round(1 / self.valid_share)
            for number, document in enumerate(self.read(self.find(self.paths))):
                if (number % every == 0) == (split == "valid"):
                    yield document

    @abstractmethod
    def file_bytes(self, file: Path) -> int | None:
        """The approximate size of a file's text in bytes; None if not known."""

    def n_bytes(self, split: Literal["train", "valid"]) -> int | None:
        """The approximate size of a split's files, or its share of them."""
        valid_files, share = self.find(self.valid or []), 1.0
        files = [file for file in self.find(self.paths) if file not in valid_files]
        if valid_files and split == "valid":
            files = valid_files
        elif not valid_files:
            share = self.valid_share if split == "valid" else 1 - self.valid_share
        sizes = [self.file_bytes(file) for file in files]
        known = [size for size in sizes if size is not None]
        return round(sum(known) * share) if len(known) == len(sizes) else None

    def read(self, files: Iterable[Path]) -> Iterator[Document]:
        """The records of several files."""
        for file in files:
            yield from self.records(file)

    def fingerprint(self) -> str:
        """A hash of the files, the keys and the validation split."""
        valid_files, keys = self.find(self.valid or []), " ".join(map(repr, self.keys.values()))
        digest = blake2b(f"{keys} {self.valid_share} {len(valid_files)}".encode(), digest_size=16)
        train_files = [file for file in self.find(self.paths) if file not in valid_files]
        for file in valid_files + train_files:
            with file.open("rb") as handle:
                digest.update(file_digest(handle, blake2b).digest())
        return digest.hexdigest()

    def find(self, paths: list[str]) -> list[Path]:
        """The files that paths, directories and glob patterns refer to, each once."""
        by_path: dict[Path, Path] = {}  # by resolved path
        for path in paths:
            expanded = Path(path).expanduser()
            if expanded.is_dir():
                matches = [
                    file for file in expanded.rglob("*") if file.name.endswith(self.suffixes)
                ]
            elif expanded.is_file() or not glob.has_magic(path):
                matches = [expanded]
            else:
                root = Path(expanded.anchor)
                matches = list(root.glob(str(expanded.relative_to(root))))
            files = [file for file in sorted(matches) if file.is_file()]
            if not files:
                raise DataError(
                    f"{path!r} matches no {self.name} file (relative to {Path.cwd()}): fix"
                    " data.paths or data.valid"
                )
            for file in files:
                by_path.setdefault(file.resolve(), file)
        return list(by_path.values())


def missing_key(where: str, option: str, key: str, present: list[str]) -> DataError:
    """The error that a record lacks a key; names the keys it has, and the closest."""
    names = ", ".join(map(repr, present)) or "none"
    close = get_close_matches(key, present, 1)
    guess = f", perhaps {close[0]!r}" if close else ""
    return DataError(
        f"{where}: no {option} {key!r} among {names}; set data.{option} to one of them{guess}"
    )
