"""From an exception to an error message and an exit code. Imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from lswt_core.distributed.print_once import print_once
from lswt_core.errors import DISK_FULL, LswtError, PluginError, ResourceError
from lswt_core.registry import Registry

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as shells report them


def run_guarded(
    command: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    announce: Callable[[BaseException], None] = lambda error: None,
) -> int:
    """Run a command and return its exit code. ``announce`` is called with an error, after it was
    printed.

    An LswtError and a full disk print a message. Any other exception prints its traceback: it is a
    bug of the core, or of a plugin, which is then named. What several ranks would print
    alike, one prints.
    """
    try:
        code = command(arguments)
        sys.stdout.flush()  # a reader that has left is told of here, and not while Python exits
        return code
    except LswtError as error:
        text = str(error)
        text = text if text.startswith("error") else f"error: {text}"
        shown = traceback.format_exc() if getattr(arguments, "traceback", False) else ""
        print_once(shown + text)
        announce(error)
        return error.exit_code
    except KeyboardInterrupt:
        print_once("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (head, less) has left. Python flushes stdout at exit, which must
        # not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    # SystemExit included: code that exits in the middle of a command has not finished it.
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            print_once(
                f"error: {error.filename or 'a file'} cannot be written: {error.strerror}\n"
                "  fix: free disk space, and run the same command again"
            )
            return ResourceError.exit_code
        text, code = describe_unexpected(error, arguments)
        print_once(f"{traceback.format_exc()}\n{text}")
        announce(error)
        return code


def describe_unexpected(error: BaseException, arguments: argparse.Namespace) -> tuple[str, int]:
    """Return whose code raised an unexpected exception, as text, and the exit code."""
    files = [file for file in getattr(arguments, "plugin", ()) if file.is_file()]
    culprit = Registry(files=files).culprit(error)
    if culprit is None:
        text = "error: this is a bug; please report it with the traceback above"
        return text, LswtError.exit_code
    target = culprit.plugin.path or culprit.plugin.distribution
    text = (
        f"error: {culprit}\n"
        "  why: this is the plugin's own code; the traceback is above\n"
        "  fix: mend it, or report it to its author;"
        f" python -m lswt_core plugins check {target} tells more"
    )
    return text, PluginError.exit_code
