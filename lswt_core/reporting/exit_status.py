"""How an exception becomes a message and an exit code. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from lswt_core.errors import LswtError, PluginError
from lswt_core.registry import Registry


def guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command; the user's errors become a sentence and an exit code. Anything else shows its
    traceback: it is a bug, or was raised in the code of a plugin, which is then named.
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
    # the reader of our output (head, less) has left; nor can Python flush what is left of it when
    # it ends
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    # SystemExit too: whoever leaves in the middle of a command has not done what was asked
    except BaseException as error:
        traceback.print_exc()
        return explained(error, arguments)


def explained(error: BaseException, arguments: argparse.Namespace) -> int:
    """Say whose mistake an exception is, below its traceback; returns the exit code."""
    found = Registry(
        files=[file for file in getattr(arguments, "plugin", ()) if file.is_file()]
    ).culprit(error)
    if found is None:
        print("\nerror: this is a bug; please report it with the traceback above", file=sys.stderr)
        return LswtError.exit_code
    target = found.plugin.path or found.plugin.distribution
    print(
        f"\nerror: {found}\n  why: this is the plugin's own code; the traceback is above\n  fix:"
        f" mend it, or report it to its author; python -m lswt_core plugins check {target} tells"
        " more",
        file=sys.stderr,
    )
    return PluginError.exit_code
