"""``python -m lswt_core explain`` and ``resolve``: where a recipe's values come from, and what they
are. Imports no torch.
"""

from __future__ import annotations

import argparse

from lswt_core.cli.common import recipe_arguments, report_source, required_registry
from lswt_core.recipe import Recipe


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``explain``."""
    parser.add_argument("key", help="e.g. train.batch_size")
    resolve_arguments(parser)


def resolve_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``resolve``."""
    recipe_arguments(parser)
    parser.add_argument("--overlay", help="apply this overlay of the recipe, e.g. cpu")


def explain(arguments: argparse.Namespace) -> int:
    """Print every value a key was given, oldest first, and where."""
    for value, origin in load(arguments).explain(arguments.key):
        source = f"   {origin.text}" if origin.text else ""
        print(f"{arguments.key} = {value!r}  <- {origin.where}{source}")
    return 0


def resolve(arguments: argparse.Namespace) -> int:
    """Print the recipe with every default written out."""
    print(load(arguments).dump(), end="")
    return 0


def load(arguments: argparse.Namespace) -> Recipe:
    """Load the recipe with the overrides and overlay of the command line."""
    recipe = Recipe.load(
        arguments.recipe,
        arguments.overrides,
        overlay=arguments.overlay,
        registry=required_registry(arguments),
    )
    report_source(recipe, arguments.recipe)
    return recipe
