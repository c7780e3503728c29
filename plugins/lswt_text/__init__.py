"""Plain text files as a data source."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Le

from lswt_core.errors import DataError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import DataSource, Document
from lswt_core.plugin_api.seeding import derive_seed


class Text(DataSource):
    """UTF-8 files: ``paths`` lists files, directories (all files at any depth that are not hidden)
    and glob patterns. Each file is a document.

    The validation set is the files listed in ``valid``; without those, the ``valid_share`` of files
    that the hash of their path relative to the listed directory selects; if that is none or all of
    them, as with a single file, the last ``valid_share`` of every file, from the start of a line.
    """

    name = "text"

    def __init__(
        self,
        *,
        paths: list[str],
        valid: list[str] | None = None,
        valid_share: Annotated[float, Gt(0), Le(0.5)] = 0.03125,
    ) -> None:
        self.paths, self.valid, self.valid_share = paths, valid, valid_share

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The texts of a split, in the order of ``paths``, sorted within each."""
        for file, name, whole in self._files(split):
            text = read_text(file)
            yield Document(name, text if whole else self._slice(text, split))

    def n_bytes(self, split: Literal["train", "valid"]) -> int:
        """The size of the split's files, or its share of it."""
        share = self.valid_share if split == "valid" else 1 - self.valid_share
        total = 0.0
        for file, _, whole in self._files(split):
            total += file.stat().st_size * (1 if whole else share)
        return round(total)

    def _files(self, split: Literal["train", "valid"]) -> Iterator[tuple[Path, str, bool]]:
        """The files of a split, their names, and whether each belongs to it as a whole."""
        files, valid_files = find_files(self.paths), find_files(self.valid or [])
        if valid_files:
            chosen = valid_files
            if split == "train":
                chosen = {file: name for file, name in files.items() if file not in valid_files}
            yield from ((file, name, True) for file, name in chosen.items())
            return
        limit = self.valid_share * 2**63  # derive gives 63 bits
        held_out = {file for file, name in files.items() if derive_seed(name) < limit}
        by_file = 0 < len(held_out) < len(files)
        for file, name in files.items():
            if not by_file or (file in held_out) == (split == "valid"):
                yield file, name, by_file

    def fingerprint(self) -> str:
        """A hash of paths, contents and the validation split."""
        valid_files = find_files(self.valid or [])
        split = f"{self.valid_share} {sorted(valid_files.values())}"
        digest = blake2b(split.encode(), digest_size=16)
        for file, name in (find_files(self.paths) | valid_files).items():
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def _slice(self, text: str, split: Literal["train", "valid"]) -> str:
        """A split's share of a text: the end for validation, the start for training."""
        end = round(len(text) * (1 - self.valid_share))
        end = text.rfind("\n", 0, end) + 1 or end
        return text[end:] if split == "valid" else text[:end]


def find_files(paths: list[str]) -> dict[Path, str]:
    """The files that paths, directories and glob patterns refer to, each with its path relative to
    the listed directory.
    """
    names: dict[Path, str] = {}
    for path in paths:
        matches = match_files(Path(path).expanduser())
        if not matches:
            raise DataError(
                f"{path!r} matches no file (relative to {Path.cwd()}): fix data.paths or data.valid"
            )
        for file, name in matches.items():
            names.setdefault(file.resolve(), name.as_posix())
    return names


def match_files(path: Path) -> dict[Path, Path]:
    """The files that one path, directory or glob pattern refers to, in order, each with its path
    relative to the directory or to the part of the pattern before the first wildcard. Hidden files
    are left out unless listed themselves.
    """
    root, pattern = path.parent, glob.escape(path.name)
    if path.is_dir():
        root, pattern = path, "**/*"
    elif not path.is_file() and glob.has_magic(str(path)):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        pattern = str(path.relative_to(root))
    matches = {}
    for file in sorted(root.glob(pattern)):
        name = file.relative_to(root)
        hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and (path.is_file() or not hidden):
            matches[file] = name
    return matches


def read_text(file: Path) -> str:
    """The text of a file, with its line ends."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8:"
            f" {error.reason}; convert the file to UTF-8 or leave it out"
        ) from error
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}; fix data.paths or the file's permissions"
        ) from error


@hookimpl
def lswt_components() -> list[type]:
    """Offer plain text files."""
    return [Text]
