"""What commands share: arguments, and what they print. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from lswt_core.distributed.print_once import print_once
from lswt_core.errors import EXIT_CODES, UsageError
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry


class Entry(NamedTuple):
    """A command: its name, its arguments, its function, and one line of help."""

    name: str
    arguments_of: Callable[[argparse.ArgumentParser], None]
    function: Callable[[argparse.Namespace], int]
    summary: str


# ---------- arguments


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors one of several ranks prints."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit with code 2."""
        print_once(f"{self.format_usage()}{self.prog}: error: {message}")
        raise SystemExit(UsageError.exit_code)


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, overrides, and plugins that are not installed."""
    parser.add_argument(
        "recipe",
        type=Path,
        help="a TOML file, or the name of an installed recipe, e.g. quickstart (see: recipes)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a value of the recipe, e.g. train.steps=100 memory.xl=false",
    )
    plugin_argument(parser)


def plugin_argument(parser: argparse.ArgumentParser) -> None:
    """Plugins that are not installed."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a single-file plugin that is not installed",
    )


def registry_of(arguments: argparse.Namespace) -> Registry:
    """The registry of installed plugins and the files named on the command line."""
    return Registry(files=arguments.plugin)


def required_registry(arguments: argparse.Namespace) -> Registry:
    """The same; raises PluginError if one of the files cannot be imported, whether it is used or
    not.
    """
    registry = registry_of(arguments)
    registry.require_files()
    return registry


# ---------- output


def report_source(recipe: Recipe, given: Path) -> None:
    """Say on stderr which file a recipe was read from, if it was given by name."""
    if recipe.source != str(given):
        print(f"recipe {given}: {recipe.source}", file=sys.stderr)


def next_commands(*commands: str) -> str:
    """The last lines of a command's output: commands that continue from here."""
    return "\n".join(["", "next:", *(f"  python -m {command}" for command in commands)])


def exit_codes() -> str:
    """The exit codes and their meanings, for ``--help``."""
    lines = [f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(["exit codes:", *lines])
