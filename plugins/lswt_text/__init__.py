"""Plain text files as a source of documents."""

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
    """UTF-8 files: ``paths`` lists files, directories (all files below that are not hidden) and
    glob patterns. A document is a file.

    Held out are the files listed in ``valid``; else those whose path, taken below the directory
    that was named, has a hash in the ``valid_share``; and if these are none or all, as with a
    single file, the last ``valid_share`` of every file, from the beginning of a line where there is
    one.
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
            yield Document(name, read(file) if whole else self._cut(read(file), split))

    def n_bytes(self, split: Literal["train", "valid"]) -> int:
        """Of the files, and of those that are cut their share."""
        share = self.valid_share if split == "valid" else 1 - self.valid_share
        return round(
            sum(
                file.stat().st_size * (1 if whole else share)
                for file, _, whole in self._files(split)
            )
        )

    def _files(self, split: Literal["train", "valid"]) -> Iterator[tuple[Path, str, bool]]:
        """Files of a split, their names, and whether they belong to it as a whole."""
        files, listed = find(self.paths), find(self.valid or [])
        if listed:
            chosen = (
                listed
                if split == "valid"
                else {file: name for file, name in files.items() if file not in listed}
            )
            yield from ((file, name, True) for file, name in chosen.items())
            return
        # derive gives 63 bits
        held = {
            file for file, name in files.items() if derive_seed(name) < self.valid_share * 2**63
        }
        parted = bool(held) and len(held) < len(files)
        for file, name in files.items():
            if not parted or (file in held) == (split == "valid"):
                yield file, name, parted

    def fingerprint(self) -> str:
        """A hash of paths, contents and what is held out."""
        listed = find(self.valid or [])
        digest = blake2b(f"{self.valid_share} {sorted(listed.values())}".encode(), digest_size=16)
        for file, name in (find(self.paths) | listed).items():
            content = file.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()

    def _cut(self, text: str, split: Literal["train", "valid"]) -> str:
        """A text's own share of a split."""
        place = round(len(text) * (1 - self.valid_share))
        place = text.rfind("\n", 0, place) + 1 or place
        return text[place:] if split == "valid" else text[:place]


def find(paths: list[str]) -> dict[Path, str]:
    """The files that files, directories and glob patterns stand for, each with its path below the
    directory that was named.
    """
    found: dict[Path, str] = {}
    for path in paths:
        place = Path(path).expanduser()
        root, pattern = place.parent, glob.escape(place.name)
        if place.is_dir():
            root, pattern = place, "**/*"
        elif not place.is_file() and glob.has_magic(path):
            root = Path(*takewhile(lambda part: not glob.has_magic(part), place.parts))
            pattern = str(place.relative_to(root))
        files = [file for file in sorted(root.glob(pattern)) if file.is_file()]
        names = {file: file.relative_to(root) for file in files}
        taken = [
            file
            for file in files
            if place.is_file() or not any(part.startswith(".") for part in names[file].parts)
        ]
        if not taken:
            raise DataError(
                f"{path!r} names no file (looked from {Path.cwd()}): mend data.paths or data.valid"
            )
        for file in taken:
            found.setdefault(file.resolve(), names[file].as_posix())
    return found


def read(file: Path) -> str:
    """The text of a file, its line ends as they are."""
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        cure = "convert the file to UTF-8 or leave it out"
        raise DataError(
            f"{file}: byte {error.start} (0x{error.object[error.start]:02x}) is not UTF-8:"
            f" {error.reason}; {cure}"
        ) from error
    except OSError as error:
        raise DataError(
            f"{file} cannot be read: {error.strerror}; mend data.paths or the file's permissions"
        ) from error


@hookimpl
def lswt_components() -> list[type]:
    """Offer plain text."""
    return [Text]
