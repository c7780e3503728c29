"""Reads recipe files and the ones they extend; everything in them is untrusted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from lswt_core.errors import Problem, RecipeError
from lswt_core.recipe.provenance import Origin
from lswt_core.recipe.toml_lines import Key, index
from lswt_core.registry import nearest

LARGEST = 2**20  # bytes
DEEPEST = 8  # files that extend one another


class File(NamedTuple):
    """One recipe file."""

    shown: str  # its path in messages
    path: Path  # its real path
    lines: list[str]
    tables: dict[str, Any]
    numbers: dict[Key, int]

    def locate(self, key: Key) -> Origin:
        """Where a key, or else the nearest table around it, is written."""
        while key and key not in self.numbers:
            key = key[:-1]
        return self.line(self.numbers.get(key, 1))

    def line(self, number: int) -> Origin:
        """A line, by its number."""
        return Origin(f"{self.shown}:{number}", excerpt(self.lines, number))


def excerpt(lines: list[str], number: int) -> str:
    """One line, fit to be printed."""
    text = lines[number - 1].strip() if number <= len(lines) else ""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:120])


def stop(what: str, origin: Origin, why: str, fix: str) -> RecipeError:
    """An error that leaves nothing else to check."""
    return RecipeError([Problem(what, origin.where, why, fix, origin.text)])


def read_chain(path: str | Path) -> list[File]:
    """A recipe file and all it extends, the most basic one first."""
    shown = str(path)
    real = find(path)
    root = next((parent for parent in real.parents if parent.name == "recipes"), real.parent)
    chain = [read(real, shown, Origin(shown, ""))]
    while "extends" in chain[-1].tables:
        chain.append(follow(chain, root))
    return chain[::-1]


def find(path: str | Path) -> Path:
    """The real path of the recipe asked for."""
    try:
        real = Path(path).resolve(strict=True)
        if real.is_file():
            return real
        why = "it is not a file"
    # RuntimeError: a loop of links (Python < 3.13); ValueError: a null byte
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
    raise stop(f"cannot read the recipe {path}", Origin(str(path), ""), why, suggest(Path(path)))


def suggest(path: Path, start: Path | None = None) -> str:
    """Which recipe was probably meant; as a path from ``start``, if given."""
    try:
        near = sorted(
            {
                file
                for folder in (path.parent, *([] if start else [Path("recipes")]))
                for file in folder.glob("*.toml")
            }
        )
    except (OSError, ValueError):
        near = []
    names = {
        file.stem: os.path.relpath(file, start) if start else str(file) for file in reversed(near)
    }
    if guess := nearest(path.stem, names):
        return f"did you mean {names[guess]}?"
    return (
        "give the path of a .toml"
        f" file{'; there are ' if names else ''}{', '.join(sorted(names.values())[:10])}"
    )


def follow(chain: list[File], root: Path) -> File:
    """The file that the last one of a chain extends."""
    file = chain[-1]
    reference, origin = file.tables.pop("extends"), file.locate(("extends",))
    what = f"cannot extend {reference!r}"
    if not isinstance(reference, str) or not reference or Path(reference).is_absolute():
        raise stop(
            what,
            origin,
            "it must be a relative path in quotes",
            'write e.g. extends = "family/lswt.toml"',
        )
    try:
        real = (file.path.parent / reference).resolve()
        exists = real.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise stop(
            what, origin, str(error), "give the path of a .toml file, relative to this one"
        ) from error
    if not real.is_relative_to(root):
        raise stop(
            what,
            origin,
            f"it resolves to {real}, outside of {root}",
            f"copy that file to a place below {root}",
        )
    if not exists:
        raise stop(what, origin, f"there is no file {real}", suggest(real, file.path.parent))
    if real in [link.path for link in chain]:
        raise stop(what, origin, f"{real} extends this file in turn", "remove one of the two")
    if len(chain) == DEEPEST:
        raise stop(
            what,
            origin,
            f"recipes extend one another at most {DEEPEST} deep",
            "merge some of these files",
        )
    return read(real, os.path.normpath(Path(file.shown).parent / reference), origin)


def read(path: Path, shown: str, asked: Origin) -> File:
    """Parse one file; ``asked`` is where it is named."""
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except OSError as error:
        raise stop(
            f"cannot read {shown}", asked, error.strerror or str(error), "give a readable file"
        ) from error
    if len(data) > LARGEST:
        raise stop(
            f"{shown} is too large",
            asked,
            f"recipes end at {LARGEST:,} bytes",
            "give a recipe, not a data file",
        )
    text = decode(data, shown)
    lines = text.split("\n")
    try:
        tables = tomli.loads(text)
        return File(shown, path, lines, tables, index(text))
    except tomli.TOMLDecodeError as error:
        where = Origin(f"{shown}:{error.lineno}:{error.colno}", excerpt(lines, error.lineno))
        raise stop(
            "this is not TOML",
            where,
            error.msg,
            "mend the line; texts stand in quotes, as in https://toml.io",
        ) from error
    # a number of too many digits, or nesting without end
    except (ValueError, RecursionError) as error:
        raise stop(
            "this is not TOML",
            Origin(f"{shown}:1", ""),
            str(error).partition(";")[0],
            "write a plain recipe",
        ) from error


def decode(data: bytes, shown: str) -> str:
    """The text of a file, which must be UTF-8 without a byte-order mark."""
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise stop(
            f"{shown} begins with a byte-order mark",
            Origin(f"{shown}:1", ""),
            "TOML is plain UTF-8",
            "save it as UTF-8 without BOM",
        )
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        where = Origin(f"{shown}:{data.count(bytes([10]), 0, error.start) + 1}", "")
        raise stop(
            f"{shown} is not UTF-8",
            where,
            f"byte {error.start} is {data[error.start]:#04x}",
            "save it as UTF-8",
        ) from error
