"""Starting runs on other machines: by a command that waits for them, as ``srun`` does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lswt_core.errors import UsageError

COMMAND = "{command}"


def parse_launcher(text: str | None) -> tuple[str, ...]:
    """Return the words of ``--launcher``; none without one. Raises UsageError unless one of them
    contains the run's command.
    """
    if text is None:
        return ()
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--launcher {text}: {error}\n  fix: close the quotation") from error
    if not any(COMMAND in word for word in words):
        raise UsageError(
            f"--launcher {text}: it says nowhere where a run's command goes\n"
            f"  fix: e.g. --launcher 'srun --ntasks=1 --gpus=1 {COMMAND}'"
        )
    return words


def launched(launcher: Sequence[str], command: Sequence[str]) -> list[str]:
    """Return the command line that starts a run's command: ``{command}`` as a word of its own
    stands for all words of the command, within a word for their quotation.
    """
    words: list[str] = []
    for word in launcher or (COMMAND,):
        words += command if word == COMMAND else [word.replace(COMMAND, shlex.join(command))]
    return words
