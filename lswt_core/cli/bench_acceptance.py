"""``python -m lswt_core bench --acceptance``: checks and benchmarks on whatever accelerator is
there, within a time. Imports no torch.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lswt_core.acceptance.item import Item, Result
from lswt_core.acceptance.plan import items_for
from lswt_core.acceptance.record import HTML, JSON, Record
from lswt_core.acceptance.schedule import LOG, Schedule
from lswt_core.errors import RunsFailed, UsageError
from lswt_core.plugin_api.atomic_write import make_output_directory

MINUTES = 8.0
ENDING = 3.0  # seconds of them in which results are written, and processes end
MACHINE = Item(
    "machine",
    "the device answers",
    "lswt_core.acceptance.machine:describe_machine",
    {},
    seconds=0,
    limit=120,
    group="machine",
)
OPTIONS = ("minutes", "only", "out")
OTHERS = ("recipe", "overrides", "swap", "against", "plugin")


class InsteadOfRecipe(argparse.Action):
    """A flag with which the positional arguments ``recipe`` and ``overrides`` may be missing."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, *_: Any) -> None:
        """Set the flag."""
        setattr(namespace, self.dest, True)
        namespace.overrides = namespace.overrides or []
        for action in parser._actions:
            if action.dest in ("recipe", "overrides"):
                action.required = False


def acceptance_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of an acceptance."""
    group = parser.add_argument_group(
        "acceptance of a machine",
        "without a recipe: checks of this library on the accelerator, then benchmarks in order of"
        " worth, until the time is over; on a CPU a rehearsal at nano shapes",
    )
    group.add_argument(
        "--acceptance", action=InsteadOfRecipe, nargs=0, default=False, help="run them"
    )
    within = f"it ends by itself within this time (default: {MINUTES:g})"
    group.add_argument("--minutes", type=float, metavar="M", help=within)
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of acceptance.json, .md and .html, written after every item",
    )
    group.add_argument(
        "--only",
        metavar="PATTERN",
        help="the items of these names, e.g. 'attention/*'; DIR keeps the results of the others",
    )


def refuse_without_acceptance(arguments: argparse.Namespace) -> None:
    """Raise UsageError for options of an acceptance in a benchmark of a recipe."""
    given = [name for name in OPTIONS if getattr(arguments, name) is not None]
    if given:
        raise UsageError(f"--{given[0]} goes with --acceptance, which takes no recipe")


def accept(arguments: argparse.Namespace) -> int:
    """Run the acceptance. Raises RunsFailed if an item failed."""
    began = time.monotonic()
    directory = check_arguments(arguments)
    minutes = MINUTES if arguments.minutes is None else arguments.minutes
    schedule = Schedule(directory, began + 60 * minutes - ENDING)
    found: list[Result] = []
    schedule.run([MACHINE], lambda item, result: found.append(result))
    machine = found[0]
    header = {
        "command": shlex.join(["python", "-m", "lswt_core", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "minutes": minutes,
        "machine": machine.numbers,
    }
    record = Record(directory, header)
    if machine.status != "passed":
        record.add(MACHINE, machine)
        raise RunsFailed(f"the device does not answer: {machine.reason} (see {directory / LOG})")
    schedule.memory = int(machine.numbers["memory"])
    items = chosen_items(items_for(machine.numbers), arguments.only)
    if arguments.only is not None:
        record.keep_earlier()
    return run_items(schedule, items, record)


def check_arguments(arguments: argparse.Namespace) -> Path:
    """The directory, which is made. Raises UsageError."""
    for name in OTHERS:
        if getattr(arguments, name):
            raise UsageError(f"--acceptance takes no {name}: it has models of its own")
    if arguments.out is None:
        raise UsageError("--acceptance needs --out DIR, for its results")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise UsageError("--minutes must be more than 0")
    directory: Path = arguments.out
    make_output_directory(directory, "--out")
    return directory


def chosen_items(items: Sequence[Item], pattern: str | None) -> list[Item]:
    """The items whose names match. Raises UsageError if none does."""
    chosen = [item for item in items if pattern is None or fnmatch(item.name, pattern)]
    if not chosen:
        names = "\n  ".join(item.name for item in items)
        raise UsageError(f"--only {pattern}: no item has such a name; there are\n  {names}")
    return chosen


def run_items(schedule: Schedule, items: Sequence[Item], record: Record) -> int:
    """Run all items, and print what became of them. Raises RunsFailed if one failed."""
    record.left = [item.name for item in items]
    record.write()
    estimate = sum(item.seconds for item in items)
    given = schedule.deadline - time.monotonic()
    say(f"{len(items)} items, about {estimate:.0f} s by estimate; {given:.0f} s are left for them")
    failed: list[str] = []

    def keep(item: Item, result: Result) -> None:
        record.add(item, result)
        failed.extend([item.name] if result.status == "failed" else [])
        reason = f": {result.reason}" if result.reason else ""
        say(f"{item.name}: {result.status} in {result.seconds:.0f} s{reason}")

    schedule.run(items, keep)
    print(f"{record.console()}\n\n{record.summary()}\n{record.directory / HTML}")
    if failed:
        raise RunsFailed(
            f"{', '.join(failed)} failed: see {record.directory / JSON}, and {LOG} for tracebacks"
        )
    return 0


def say(text: str) -> None:
    """Print progress."""
    print(f"... {text}", file=sys.stderr, flush=True)
