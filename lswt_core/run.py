"""``python -m lswt_core.run RECIPE [key=value ...]``: train what a recipe describes, or go on where
it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lswt_core.cli.common import Parser, exit_codes, next_commands, recipe_arguments, registry_of
from lswt_core.cli.third_party_checks import check_plugins, unchecked_argument
from lswt_core.recipe import Recipe
from lswt_core.reporting.exit_status import run_guarded

DESCRIPTION = (
    "Train what a recipe describes. The same command again, or --resume, continues exactly where"
    " the run stopped."
)


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
    unchecked_argument(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")


def run(arguments: argparse.Namespace) -> int:
    """Check the recipe before anything slow happens, then train."""
    registry = registry_of(arguments)
    # every mistake shows now, without torch
    recipe = Recipe.load(arguments.recipe, arguments.overrides, registry=registry)
    registry.require_files()
    from lswt_core.train.session import Session  # imports torch

    directory = arguments.out or Path("runs") / recipe.name

    def check(chosen: Recipe, say: Callable[[str], None]) -> None:
        check_plugins(arguments, [chosen], registry, say)

    session = Session(arguments, recipe, registry, directory, check)
    code = session.run()
    if code == 0 and session.world.rank == 0:
        place, given = shlex.quote(str(directory)), shlex.quote(str(arguments.recipe))
        files = [word for file in arguments.plugin for word in ("--plugin", str(file))]
        plugins = f" {shlex.join(files)}" if files else ""
        look = f'lswt_core generate {place}{plugins} --prompt "def parse("'
        if not recipe.sample.prompt:  # which may not be about text that one writes
            look = f"lswt_core evaluate {place}{plugins}"
        print(next_commands(look, f"lswt_core ablate {given}{plugins} --swap ffn=gelu"))
    return code


def announce(error: BaseException) -> None:
    """Tell the other ranks of the run, if there are any, that this one ends with an error."""
    from lswt_core.distributed.rendezvous import announce_failure

    announce_failure(error)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``python -m lswt_core.run``."""
    parser = Parser(
        prog="python -m lswt_core.run",
        description=DESCRIPTION,
        epilog=exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments_of(parser)
    return run_guarded(run, parser.parse_intermixed_args(argv), announce)


if __name__ == "__main__":
    sys.exit(main())
