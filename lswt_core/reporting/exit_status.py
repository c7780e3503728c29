"""From an exception to an error message and an exit code. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from lswt_core.errors import LswtError, PluginError
from lswt_core.registry import Registry

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as shells report them


def run_guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command and return its exit code.

    An LswtError prints its message. Any other exception prints its traceback: it is a bug of the
    core, or of a plugin, which is then named.
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
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has left. Python flushes stdout at exit, which must
        # not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    # SystemExit included: code that exits in the middle of a command has not finished it.
    except BaseException as error:
        traceback.print_exc()
        return report_unexpected(error, arguments)


def report_unexpected(error: BaseException, arguments: argparse.Namespace) -> int:
    """Print whose code raised an unexpected exception; return the exit code."""
    files = [file for file in getattr(arguments, "plugin", ()) if file.is_file()]
    culprit = Registry(files=files).culprit(error)
    if culprit is None:
        print("\nerror: this is a bug; please report it with the traceback above", file=sys.stderr)
        return LswtError.exit_code
    target = culprit.plugin.path or culprit.plugin.distribution
    print(
        f"\nerror: {culprit}\n"
        "  why: this is the plugin's own code; the traceback is above\n"
        "  fix: mend it, or report it to its author;"
        f" python -m lswt_core plugins check {target} tells more",
        file=sys.stderr,
    )
    return PluginError.exit_code
