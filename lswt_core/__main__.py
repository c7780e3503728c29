"""``python -m lswt_core`` (or ``lswt``): all commands. Each imports what it needs when it is
called.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from lswt_core import __version__
from lswt_core import run as run_command
from lswt_core.cli import ablate as ablate_command
from lswt_core.cli import ablate_arguments
from lswt_core.cli import bench as bench_command
from lswt_core.cli import claims as claims_command
from lswt_core.cli import coord_check as coord_check_command
from lswt_core.cli import evaluate as evaluate_command
from lswt_core.cli import explain as explain_command
from lswt_core.cli import export as export_command
from lswt_core.cli import generate as generate_command
from lswt_core.cli import plan as plan_command
from lswt_core.cli import plugins as plugins_command
from lswt_core.cli import recipes as recipes_command
from lswt_core.cli import tokenize as tokenize_command
from lswt_core.cli.common import Entry, Parser, exit_codes
from lswt_core.reporting.exit_status import run_guarded

COMMANDS = (
    Entry(
        "run",
        run_command.arguments_of,
        run_command.run,
        "train what a recipe describes, or resume it",
    ),
    Entry(
        "tokenize",
        tokenize_command.arguments_of,
        tokenize_command.tokenize,
        "tokenise a recipe's text once, for runs on any number of machines",
    ),
    Entry(
        "ablate",
        ablate_arguments.arguments_of,
        ablate_command.ablate,
        "compare a recipe with swaps of its components, honestly",
    ),
    Entry(
        "evaluate",
        evaluate_command.arguments_of,
        evaluate_command.evaluate,
        "whether a trained model uses its memory, how far back, and what it is worth",
    ),
    Entry(
        "claims",
        claims_command.arguments_of,
        claims_command.claims,
        "what finished studies say of claims, as one page",
    ),
    Entry(
        "generate",
        generate_command.arguments_of,
        generate_command.generate,
        "generate text with a trained model",
    ),
    Entry(
        "export",
        export_command.export_arguments,
        export_command.export,
        "write a run as a HuggingFace model, and push it",
    ),
    Entry(
        "import",
        export_command.import_arguments,
        export_command.import_original,
        "turn a checkpoint of the original authors' code into our format",
    ),
    Entry(
        "plan",
        plan_command.arguments_of,
        plan_command.plan,
        "parameters, memory, FLOPs and time of a recipe; allocates nothing",
    ),
    Entry(
        "bench",
        bench_command.arguments_of,
        bench_command.bench,
        "throughput of training, evaluation and decoding, against other recipes and libraries",
    ),
    Entry(
        "coord-check",
        coord_check_command.arguments_of,
        coord_check_command.coord_check,
        "whether activations grow with the width of a model, as they must not under muP",
    ),
    Entry(
        "explain",
        explain_command.explain_arguments,
        explain_command.explain,
        "where a value of a recipe comes from",
    ),
    Entry(
        "resolve",
        explain_command.resolve_arguments,
        explain_command.resolve,
        "print a recipe with every default written out",
    ),
)


class Group(NamedTuple):
    """Commands under a common name."""

    name: str
    summary: str
    entries: Sequence[Entry]
    default: str | None = None  # the command that the bare name stands for


GROUPS = (
    Group(
        "recipes",
        "what recipes are installed; copy one to start your own",
        recipes_command.COMMANDS,
        default="list",
    ),
    Group("plugins", "what is installed, and packages of your own", plugins_command.COMMANDS),
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands and their arguments."""
    parser = Parser(
        prog="lswt",
        description="Pretrain and ablate language models of the LSWTransformer family.",
        epilog=exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    add(commands, COMMANDS)
    for group in GROUPS:
        add_group(commands, group)
    return parser


def add_group(commands: Any, group: Group) -> None:
    """Give a group of commands its parsers."""
    parser = commands.add_parser(group.name, help=group.summary, description=group.summary)
    subcommands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=group.default is None
    )
    add(subcommands, group.entries)
    for entry in group.entries:
        if entry.name == group.default:
            parser.set_defaults(**vars(subcommands.choices[entry.name].parse_args([])))


def add(commands: Any, entries: Sequence[Entry]) -> None:
    """Give every command its parser."""
    for entry in entries:
        parser = commands.add_parser(entry.name, help=entry.summary, description=entry.summary)
        parser.set_defaults(function=entry.function)
        entry.arguments_of(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if hasattr(arguments, "overrides"):
        arguments.overrides += overrides
        rest = [word for word in rest if word not in overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not hasattr(arguments, "function"):
        parser.print_help()
        return 0
    if arguments.function is run_command.run:
        return run_guarded(run_command.run, arguments, run_command.announce)
    return run_guarded(arguments.function, arguments)


if __name__ == "__main__":
    sys.exit(main())
