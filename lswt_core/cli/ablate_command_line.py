"""The command lines of an ablation: the one that was given, and those that come next."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lswt_core.cli.common import next_commands

STORE = Path("runs/store")  # default of --store


def words_of(arguments: argparse.Namespace) -> list[str]:
    """The command's words that decide what is compared."""
    words = [str(arguments.recipe), *arguments.overrides]
    for name in ("swap", "arm", "allow", "tune", "probe", "plugin"):
        words += [word for value in getattr(arguments, name) for word in (f"--{name}", str(value))]
    for name in (
        *("plan", "seeds", "match", "margin", "tuning_seeds", "horizons", "ladder"),
        *("jobs", "devices"),
    ):
        value = getattr(arguments, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    words += [] if arguments.launcher is None else ["--launcher", arguments.launcher]
    if arguments.looks is not None:
        words += ["--looks", ",".join(map(str, arguments.looks))]
    return (
        words
        + (["--knob", arguments.knob] if arguments.match not in (None, "none") else [])
        + (["--sequential"] if arguments.sequential else [])
        + (["--full"] if arguments.full else [])
        + (["--unchecked"] if arguments.unchecked else [])
    )


def after_dry_run(arguments: argparse.Namespace) -> str:
    """What comes after arms were certified: the same ablation, with its runs."""
    return next_commands(command_of(arguments))


def command_of(arguments: argparse.Namespace) -> str:
    """``lswt_core ablate ...``, with the directories that were given."""
    words = words_of(arguments)
    if arguments.out is not None:
        words += ["--out", str(arguments.out)]
    if arguments.store != STORE:
        words += ["--store", str(arguments.store)]
    return f"lswt_core ablate {shlex.join(words)}"
