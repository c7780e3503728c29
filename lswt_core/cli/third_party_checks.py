"""Checks of other people's components before ``run`` and ``ablate`` train with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

from lswt_core.recipe import Recipe
from lswt_core.registry import Registry


def unchecked_argument(parser: argparse.ArgumentParser) -> None:
    """Whether to skip the checks."""
    parser.add_argument(
        "--unchecked",
        action="store_true",
        help="train with plugins of others without checking that they keep their interfaces",
    )


def check_plugins(
    arguments: argparse.Namespace,
    recipes: Iterable[Recipe],
    registry: Registry,
    say: Callable[[str], None],
) -> None:
    """Check every component of some recipes that is not of this distribution, once for each content
    of its code. Raises PluginError if one fails.
    """
    components = [chosen for recipe in recipes for chosen in recipe.third_party()]
    if arguments.unchecked or not components:
        return
    from lswt_core.conformance.before_run import check_components  # slow to import

    unique = [one for place, one in enumerate(components) if one not in components[:place]]
    check_components(unique, registry, say)
