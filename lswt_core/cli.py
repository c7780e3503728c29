"""What the commands share: arguments, and how an error reaches the user. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lswt_core.errors import LswtError, PluginError
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
        "overrides", nargs="*", metavar="key=value", help="override a value of the recipe, e.g. train.steps=100 memory.xl=false"
    )
    plugin_argument(parser)


def plugin_argument(parser: argparse.ArgumentParser) -> None:
    """Plugins that are not installed."""
    parser.add_argument(
        "--plugin", action="append", default=[], type=Path, metavar="FILE", help="a single-file plugin that is not installed"
    )


def registry_of(arguments: argparse.Namespace) -> Registry:
    """What is installed, and the files named on the command line."""
    return Registry(files=arguments.plugin)


def required_registry(arguments: argparse.Namespace) -> Registry:
    """The same; raises PluginError if one of the files cannot be imported, whether it is used or not."""
    registry = registry_of(arguments)
    registry.require_files()
    return registry


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command; the user's errors become a sentence and an exit code. Anything else shows its traceback: it is a bug, or was
    raised in the code of a plugin, which is then named.
    """
    try:
        return command(arguments)
    except LswtError as error:
        if getattr(arguments, "traceback", False):
            traceback.print_exc()
        text = str(error)
        print(text if text.startswith("error") else f"error: {text}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) has left; nor can Python flush what is left of it when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as error:  # SystemExit too: whoever leaves in the middle of a command has not done what was asked
        traceback.print_exc()
        return explained(error, arguments)


def explained(error: BaseException, arguments: argparse.Namespace) -> int:
    """Say whose mistake an exception is, below its traceback; returns the exit code."""
    found = Registry(files=[file for file in getattr(arguments, "plugin", ()) if file.is_file()]).culprit(error)
    if found is None:
        print("\nerror: this is a bug; please report it with the traceback above", file=sys.stderr)
        return LswtError.exit_code
    target = found.plugin.path or found.plugin.distribution
    print(
        f"\nerror: {found}\n  why: this is the plugin's own code; the traceback is above\n"
        f"  fix: mend it, or report it to its author; python -m lswt_core plugins check {target} tells more",
        file=sys.stderr,
    )
    return PluginError.exit_code
