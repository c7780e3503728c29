"""Reads recipe files and the ones they extend; everything in them is untrusted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from lswt_core.errors import Problem, RecipeError
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.packaged import (
    SUFFIX,
    UnusableReference,
    is_qualified,
    own_recipes,
    packaged_path,
)
from lswt_core.recipe.provenance import OVERLAYS, Origin
from lswt_core.recipe.schema import CORE_TABLES
from lswt_core.recipe.toml_lines import Key, index
from lswt_core.registry import nearest
from lswt_core.registry.kinds import KIND_OF_TABLE

LARGEST = 2**20  # bytes
DEEPEST = 8  # files that extend one another
# what stands at the top of recipes and ablation files
KNOWN_KEYS = {"extends", "recipe", LAYERS, *CORE_TABLES, *KIND_OF_TABLE, *OVERLAYS}


class File(NamedTuple):
    """One recipe file."""

    shown: str  # its path in messages
    path: Path  # its real path
    lines: list[str]
    tables: dict[str, Any]
    numbers: dict[Key, int]

    def locate(self, key: Key) -> Origin:
        """The origin of a key, or else of the nearest table around it."""
        while key and key not in self.numbers:
            key = key[:-1]
        return self.line(self.numbers.get(key, 1))

    def line(self, number: int) -> Origin:
        """The origin of a line."""
        return Origin(f"{self.shown}:{number}", excerpt(self.lines, number))


def excerpt(lines: list[str], number: int) -> str:
    """One line, printable and at most 120 characters long."""
    text = lines[number - 1].strip() if number <= len(lines) else ""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:120])


def stop(what: str, origin: Origin, why: str, fix: str) -> RecipeError:
    """A fatal error: nothing else can be checked."""
    return RecipeError([Problem(what, origin.where, why, fix, origin.text)])


def read_chain(recipe: str | Path) -> list[File]:
    """A recipe file and all it extends, the most basic one first."""
    real = find(recipe)
    shown = str(recipe) if Path(recipe).is_file() else shown_path(real)
    chain = [read(real, shown, Origin(shown, ""))]
    while "extends" in chain[-1].tables:
        chain.append(read_extended(chain))
    return chain[::-1]


def shown_path(path: Path) -> str:
    """A path as messages show it: relative where it is below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def find(recipe: str | Path, folder: Path = Path()) -> Path:
    """The real path of a recipe given by a path, relative to ``folder``, or by name.

    A file that exists wins. Else "PACKAGE:NAME" is a packaged recipe, and "small", "small.toml"
    and "recipes/small.toml" are a recipe of the user's (NAME.toml, recipes/NAME.toml) or, if
    there is none, of this package. Raises RecipeError.
    """
    given = folder / recipe
    try:
        if os.path.lexists(given) and not given.is_dir():
            return real_file(given)
        return named_recipe(Path(recipe).as_posix(), folder) or real_file(given)
    except UnusableReference as error:
        why, fix = error.why, error.fix
    # RuntimeError: a loop of links (Python < 3.13); ValueError: a null byte
    except (OSError, RuntimeError, ValueError) as error:
        why, fix = getattr(error, "strerror", None) or str(error), suggest(given)
    raise stop(f"cannot read the recipe {recipe}", Origin(str(recipe), ""), why, fix)


def real_file(path: Path) -> Path:
    """The path without links; raises OSError, RuntimeError or ValueError if it is no file."""
    real = path.resolve(strict=True)
    if not real.is_file():
        raise OSError("it is not a file")
    return real


def named_recipe(reference: str, folder: Path) -> Path | None:
    """The file of a recipe given by name; None if there is none of that name. Raises
    UnusableReference for an unknown "PACKAGE:NAME".
    """
    if is_qualified(reference):
        return packaged_path(reference).resolve()
    name = reference.removeprefix("recipes/").removesuffix(SUFFIX)
    for local in (folder / f"{name}{SUFFIX}", folder / "recipes" / f"{name}{SUFFIX}"):
        if reference == name and local.is_file():
            return local.resolve()
    own = own_recipes().get(name)
    return own.path.resolve() if own is not None else None


def suggest(path: Path, start: Path | None = None) -> str:
    """Which recipe was probably meant; as a file in the folder ``start`` extends it, if given."""
    try:
        near = [file for file in sorted(path.parent.glob(f"*{SUFFIX}")) if may_be_recipe(file)]
    except (OSError, ValueError):
        near = []
    local = {file.stem: os.path.relpath(file, start) if start else str(file) for file in near}
    packaged = {name: own.qualified if start else name for name, own in own_recipes().items()}
    names = packaged | local
    if guess := nearest(path.stem, names):
        return f"did you mean {names[guess]}?"
    there = f"; there are {', '.join(sorted(local.values())[:10])}" if local else ""
    return f"give the path of a .toml file, or a name of: python -m lswt_core recipes{there}"


def may_be_recipe(path: Path) -> bool:
    """Whether a TOML file has a table or key of recipes or ablation files, or none at all; another
    program's (pyproject.toml) has not. True if it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            keys = tomli.loads(stream.read(LARGEST).decode()).keys()
    except (OSError, ValueError, RecursionError):
        return True
    return not keys or not keys.isdisjoint(KNOWN_KEYS)


def read_extended(chain: list[File]) -> File:
    """The file that the last one of a chain extends."""
    file = chain[-1]
    reference, origin = file.tables.pop("extends"), file.locate(("extends",))
    what = f"cannot extend {reference!r}"
    try:
        real = extended_path(reference, file.path.parent)
    except UnusableReference as error:
        raise stop(what, origin, error.why, error.fix) from error
    except (OSError, RuntimeError, ValueError) as error:
        fix = "give the path of a .toml file, relative to this one"
        raise stop(what, origin, str(error), fix) from error
    if real in [link.path for link in chain]:
        raise stop(what, origin, f"{real} extends this file in turn", "remove one of the two")
    if len(chain) == DEEPEST:
        why = f"recipes extend one another at most {DEEPEST} deep"
        raise stop(what, origin, why, "merge some of these files")
    shown = os.path.normpath(Path(file.shown).parent / reference)
    return read(real, shown_path(real) if is_qualified(reference) else shown, origin)


def extended_path(reference: object, folder: Path) -> Path:
    """The real path of what a file in ``folder`` extends. Raises UnusableReference if that is no
    recipe, OSError, RuntimeError or ValueError if the path cannot be looked up.
    """
    if not isinstance(reference, str) or not reference:
        fix = 'write e.g. extends = "lswt:small" or extends = "../base.toml"'
        raise UnusableReference("it must be a path or a packaged recipe's name, in quotes", fix)
    if is_qualified(reference):
        return packaged_path(reference).resolve()
    path = folder / reference
    if path.is_symlink():
        why = "it is a symbolic link, which may come to mean another file without a trace"
        raise UnusableReference(why, "extend the file that it points to")
    real = path.resolve()
    if not real.is_file():
        raise UnusableReference(f"there is no file {real}", suggest(real, folder))
    if real.suffix != SUFFIX:
        raise UnusableReference(f"{real} is not a {SUFFIX} file", "extend a recipe")
    return real


def read(path: Path, shown: str, origin: Origin) -> File:
    """Parse one file; ``asked`` is the origin of its name. Raises RecipeError."""
    text = decode(read_bytes(path, shown, origin), shown)
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


def read_bytes(path: Path, shown: str, origin: Origin) -> bytes:
    """A file's content. Raises RecipeError if it cannot be read or is no recipe by its size."""
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except OSError as error:
        raise stop(
            f"cannot read {shown}", origin, error.strerror or str(error), "give a readable file"
        ) from error
    if len(data) > LARGEST:
        raise stop(
            f"{shown} is too large",
            origin,
            f"recipes end at {LARGEST:,} bytes",
            "give a recipe, not a data file",
        )
    return data


def decode(data: bytes, shown: str) -> str:
    """Decode a file, which must be UTF-8 without a byte-order mark."""
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
