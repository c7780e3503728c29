"""What the commands share: their arguments. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lswt_core.registry import Registry


class Entry(NamedTuple):
    """A command: what it is called, what it takes, what it does."""

    name: str
    arguments_of: Callable[[argparse.ArgumentParser], None]
    function: Callable[[argparse.Namespace], int]
    summary: str


def recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, overrides, and plugins that are not installed."""
    parser.add_argument("recipe", type=Path, help="a TOML recipe, e.g. recipes/small.toml")
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
    """What is installed, and the files named on the command line."""
    return Registry(files=arguments.plugin)


def required_registry(arguments: argparse.Namespace) -> Registry:
    """The same; raises PluginError if one of the files cannot be imported, whether it is used or
    not.
    """
    registry = registry_of(arguments)
    registry.require_files()
    return registry
