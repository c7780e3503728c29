"""Python sources that are on every machine which can run this: the standard library, and what is
installed beside it.
"""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from lswt_core.errors import DataError
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import DataSource, Document
from lswt_core.plugin_api.seeding import derive_seed

# directories
SKIPPED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)
SHARE = 32  # one file in so many is held out


class StandardLibrary(DataSource):
    """The running Python's own standard library: about 600 files, 11 MB, without tests. A document
    is a file.

    Its content varies with the Python release, so losses compare on one machine only.
    """

    name = "stdlib"

    def __init__(self) -> None:
        pass

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The files of a split, in the order of their paths."""
        return read(Path(sysconfig.get_paths()["stdlib"]), split)

    def n_bytes(self, split: Literal["train", "valid"]) -> int:
        """Of the files."""
        return size_of(Path(sysconfig.get_paths()["stdlib"]), split)

    def fingerprint(self) -> str:
        """A hash of paths and contents."""
        return digest(Path(sysconfig.get_paths()["stdlib"]))


class SitePackages(DataSource):
    """The Python sources of all packages installed beside the running Python (200 MB where this is
    installed). A document is a file.
    """

    name = "site-packages"

    def __init__(self) -> None:
        pass

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The files of a split, in the order of their paths."""
        return read(Path(sysconfig.get_paths()["purelib"]), split)

    def n_bytes(self, split: Literal["train", "valid"]) -> int:
        """Of the files."""
        return size_of(Path(sysconfig.get_paths()["purelib"]), split)

    def fingerprint(self) -> str:
        """A hash of paths and contents."""
        return digest(Path(sysconfig.get_paths()["purelib"]))


def files(root: Path) -> list[str]:
    """The Python files below a directory, as sorted relative paths."""
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        path.as_posix()
        for path in found
        if SKIPPED.isdisjoint(path.parent.parts) and (root / path).is_file()
    )


def read(root: Path, split: Literal["train", "valid"]) -> Iterator[Document]:
    """The files whose path's hash belongs to a split, in the encoding each declares (PEP 263)."""
    for name in chosen(root, split):
        try:
            with tokenize.open(root / name) as file:
                yield Document(name, file.read())
        except (SyntaxError, UnicodeDecodeError, OSError) as error:
            cure = "repair or remove the file, or take other text with data.use=text"
            raise DataError(f"{root / name} cannot be read: {error}; {cure}") from error


def chosen(root: Path, split: Literal["train", "valid"]) -> list[str]:
    """The files of a split."""
    return [name for name in files(root) if (derive_seed(name) % SHARE == 0) == (split == "valid")]


def size_of(root: Path, split: Literal["train", "valid"]) -> int:
    """Their bytes."""
    return sum((root / name).stat().st_size for name in chosen(root, split))


def digest(root: Path) -> str:
    """A hash of the files' paths and contents."""
    total = blake2b(digest_size=16)
    for name in files(root):
        content = (root / name).read_bytes()
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


@hookimpl
def lswt_components() -> list[type]:
    """Offer the two sources."""
    return [StandardLibrary, SitePackages]
