"""``python -m lswt_core recipes``: list the installed recipes, and copy one to start your own.
Imports no torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lswt_core.cli.common import Entry, next_commands
from lswt_core.errors import UsageError
from lswt_core.recipe.loader import File, find, read
from lswt_core.recipe.packaged import OWN, PackagedRecipe, own_recipes, plugin_recipes
from lswt_core.recipe.provenance import Origin
from lswt_core.recipe.toml_writer import value
from lswt_core.reporting.tables import Table


def list_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``list``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def list_recipes(arguments: argparse.Namespace) -> int:
    """Print every installed recipe by the name that commands take."""
    recipes = [*own_recipes().values(), *plugin_recipes()]
    if arguments.json:
        print(json.dumps([recipe_json(recipe) for recipe in recipes], indent=2))
        return 0
    rows = [(name_of(recipe), description(recipe.path)) for recipe in recipes]
    print(Table(("name", "what it is"), rows, text_columns=(0, 1)).text())
    print(next_commands("lswt_core.run quickstart", "lswt_core recipes copy quickstart"))
    return 0


def name_of(recipe: PackagedRecipe) -> str:
    """The shortest name that commands take."""
    return recipe.name if recipe.package == OWN else recipe.qualified


def recipe_json(recipe: PackagedRecipe) -> dict[str, str]:
    """A packaged recipe as plain data."""
    return {
        "name": name_of(recipe),
        "qualified": recipe.qualified,
        "version": recipe.version,
        "path": str(recipe.path),
        "what": description(recipe.path),
    }


def description(path: Path) -> str:
    """The comment in the first line of a recipe; empty if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[0].removeprefix("#").strip() if lines and lines[0].startswith("#") else ""


def copy_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``copy``."""
    parser.add_argument("name", metavar="NAME", help="a recipe, as listed, e.g. quickstart")
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="the file to write (default: NAME.toml)"
    )


def copy(arguments: argparse.Namespace) -> int:
    """Write a recipe's text to a file of one's own. Raises UsageError if the file exists."""
    source = find(arguments.name)
    target = arguments.file or Path(source.name)
    text = portable_text(source)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"{target} exists\n  fix: name another file") from error
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from error
    print(f"wrote {target}, a copy of {source}")
    print(next_commands(f"lswt_core.run {target}", f"lswt_core explain train.batch_size {target}"))
    return 0


def portable_text(source: Path) -> str:
    """The text of a recipe, with what it extends named so that it is found from any folder."""
    file = read(source, str(source), Origin(str(source), ""))
    reference = file.tables.get("extends")
    if not isinstance(reference, str) or ":" in reference:
        return "\n".join(file.lines)
    number = file.numbers[("extends",)] - 1
    file.lines[number] = f"extends = {value(portable_reference(file, reference))}"
    return "\n".join(file.lines)


def portable_reference(file: File, reference: str) -> str:
    """A relative ``extends`` as "PACKAGE:NAME" if it leads to a packaged recipe, else as an
    absolute path.
    """
    path = find(reference, file.path.parent)
    for recipe in (*own_recipes().values(), *plugin_recipes()):
        if recipe.path.resolve() == path:
            return recipe.qualified
    return str(path)


COMMANDS = (
    Entry("list", list_arguments, list_recipes, "every installed recipe and what it is"),
    Entry("copy", copy_arguments, copy, "start a recipe of your own from an installed one"),
)
