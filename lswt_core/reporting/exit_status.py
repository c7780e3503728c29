"""From an exception to an error message and an exit code. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from lswt_core.errors import DISK_FULL, LswtError, PluginError, ResourceError
from lswt_core.registry import Registry

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as shells report them


def run_guarded(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command and return its exit code.

    An LswtError and a full disk print a message. Any other exception prints its traceback: it is a
    bug of the core, or of a plugin, which is then named.
    """
    try:
        return command(arguments)
    except LswtError as error:
        if getattr(arguments, "traceback", False):
            traceback.print_exc()
        text = str(error)
        print_error(text if text.startswith("error") else f"error: {text}")
        return error.exit_code
    except KeyboardInterrupt:
        print_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has left. Python flushes stdout at exit, which must
        # not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    # SystemExit included: code that exits in the middle of a command has not finished it.
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            print_error(
                f"error: {error.filename or 'a file'} cannot be written: {error.strerror}\n"
                "  fix: free disk space, and run the same command again"
            )
            return ResourceError.exit_code
        traceback.print_exc()
        return report_unexpected(error, arguments)


def print_error(text: str) -> None:
    """Print to standard error, which may be a file on a full disk."""
    with suppress(OSError):
        print(text, file=sys.stderr)


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
