"""``python -m lswt_core.run RECIPE [key=value ...]``: train what a recipe describes, or go on where
it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lswt_core.cli.common import recipe_arguments, registry_of
from lswt_core.recipe import Recipe
from lswt_core.reporting.exit_status import run_guarded

DESCRIPTION = """Train what a recipe describes. The same command again, or --resume, continues exactly where the run stopped.

exit codes: 0 done, 2 recipe, 3 plugin, 4 data, 5 checkpoint, 6 numerics, 7 memory or disk, 70 bug, 73 directory in use,
75 stopped and saved (run the same command to continue)"""


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    recipe_arguments(parser)
    parser.add_argument("--out", type=Path, help="run directory (default: runs/<recipe>)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the directory (also the default where there is one)",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="ignore the recipe's [cpu] overlay: the full run, whatever the device",
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="continue although optimizer, schedule, length or a plugin's code have changed",
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")


def run(arguments: argparse.Namespace) -> int:
    """Check the recipe before anything slow happens, then train."""
    registry = registry_of(arguments)
    # every mistake shows now, without torch
    recipe = Recipe.load(arguments.recipe, arguments.overrides, registry=registry)
    registry.require_files()
    from lswt_core.train.session import Session  # imports torch

    directory = arguments.out or Path("runs") / recipe.name
    return Session(arguments, recipe, registry, directory).run()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``python -m lswt_core.run``."""
    parser = argparse.ArgumentParser(
        prog="python -m lswt_core.run",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments_of(parser)
    return run_guarded(run, parser.parse_intermixed_args(argv))


if __name__ == "__main__":
    sys.exit(main())
