"""``python -m lswt_core explain`` and ``resolve``: where a recipe's values come from, and what they
are. Imports no torch.
"""

from __future__ import annotations

import argparse

from lswt_core.cli.common import recipe_arguments, required_registry
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
    """Where a value comes from, oldest first."""
    for value, origin in load(arguments).explain(arguments.key):
        print(
            f"{arguments.key} = {value!r}  <- {origin.where}"
            + (f"   {origin.text}" if origin.text else "")
        )
    return 0


def resolve(arguments: argparse.Namespace) -> int:
    """The recipe with every default written out."""
    print(load(arguments).dump(), end="")
    return 0


def load(arguments: argparse.Namespace) -> Recipe:
    """The recipe, with what the command line says."""
    return Recipe.load(
        arguments.recipe,
        arguments.overrides,
        overlay=arguments.overlay,
        registry=required_registry(arguments),
    )
