"""Python sources as text, which every machine has: the standard library and installed packages."""

from __future__ import annotations

import os
import re
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

SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
)
# Of the files that may be in the validation set, one in so many is. They are whole and short, so
# that 60,000 tokens come from more than thirty, and none has more than a twentieth.
HELD_OUT = 2
HELD_OUT_BYTES = range(1_000, 7_001)
COPIES = frozenset({"encodings"})  # directories whose files are near-copies of each other
GENERATED = re.compile(rb"generated (by|from|and)|auto-?generated|automatically generated", re.I)
HEAD = 600  # bytes in which a generated file says that it is one


class StandardLibrary(DataSource):
    """The running Python's standard library without its tests: about 600 files, 11 MB. Each file is
    a document. Half of the short ones that somebody wrote, about 65, are the validation set.

    It differs between Python releases, so losses are comparable on one machine only.
    """

    name = "stdlib"

    def __init__(self) -> None:
        pass

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The files of a split, in the order of their paths."""
        return read_documents(Path(sysconfig.get_paths()["stdlib"]), split)

    def n_bytes(self, split: Literal["train", "valid"]) -> int:
        """The size of the files of a split."""
        return total_size(Path(sysconfig.get_paths()["stdlib"]), split)

    def fingerprint(self) -> str:
        """A hash of paths, contents and the split."""
        return hash_files(Path(sysconfig.get_paths()["stdlib"]))


class SitePackages(DataSource):
    """The Python sources of all packages in site-packages (200 MB where lswt-core is installed).
    Each file is a document.
    """

    name = "site-packages"

    def __init__(self) -> None:
        pass

    def documents(self, split: Literal["train", "valid"]) -> Iterator[Document]:
        """The files of a split, in the order of their paths."""
        return read_documents(Path(sysconfig.get_paths()["purelib"]), split)

    def n_bytes(self, split: Literal["train", "valid"]) -> int:
        """The size of the files of a split."""
        return total_size(Path(sysconfig.get_paths()["purelib"]), split)

    def fingerprint(self) -> str:
        """A hash of paths, contents and the split."""
        return hash_files(Path(sysconfig.get_paths()["purelib"]))


def list_files(root: Path) -> list[str]:
    """The Python files below a directory, as sorted relative paths. Directories that are left out
    are not entered: site-packages, where it is in the standard library, has many more files.
    """
    found = []
    for directory, inner, files in os.walk(root):
        inner[:] = set(inner) - SKIPPED_DIRECTORIES
        paths = (Path(directory, name) for name in files if name.endswith(".py"))
        found += [path.relative_to(root).as_posix() for path in paths if path.is_file()]
    return sorted(found)


def read_documents(root: Path, split: Literal["train", "valid"]) -> Iterator[Document]:
    """The documents of a split, decoded as each file declares (PEP 263)."""
    for name in split_files(root, split):
        try:
            with tokenize.open(root / name) as file:
                yield Document(name, file.read())
        except (SyntaxError, UnicodeDecodeError, OSError) as error:
            raise DataError(
                f"{root / name} cannot be read: {error}; repair or remove the file, or use other"
                " text with data.use=text"
            ) from error


def split_files(root: Path, split: Literal["train", "valid"]) -> list[str]:
    """The files of a split."""
    return [name for name in list_files(root) if is_held_out(root, name) == (split == "valid")]


def is_held_out(root: Path, name: str) -> bool:
    """Whether a file is in the validation set: the hash of its path decides, if it is short, not
    generated, and not one of many copies.
    """
    path = root / name
    if derive_seed(name) % HELD_OUT or not COPIES.isdisjoint(path.parent.parts):
        return False
    if path.stat().st_size not in HELD_OUT_BYTES:
        return False
    with path.open("rb") as file:
        return GENERATED.search(file.read(HEAD)) is None


def total_size(root: Path, split: Literal["train", "valid"]) -> int:
    """The size in bytes of the files of a split."""
    return sum((root / name).stat().st_size for name in split_files(root, split))


def hash_files(root: Path) -> str:
    """A hash of the files' paths and contents, and of which are held out."""
    digest = blake2b(digest_size=16)
    for name in list_files(root):
        content, split = (root / name).read_bytes(), is_held_out(root, name)
        digest.update(f"{name}\0{len(content)}\0{split}\0".encode() + content)
    return digest.hexdigest()


@hookimpl
def lswt_components() -> list[type]:
    """Offer both sources."""
    return [StandardLibrary, SitePackages]
