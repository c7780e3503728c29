"""Errors that a user can fix: each says what is wrong, where, why and what to do, and carries the
command line's exit code.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError
# What the exit codes of the command line mean; README has the same table.
EXIT_CODES = {
    0: "done; of `ablate`: no run has failed",
    2: (
        "the command or the recipe is invalid, or not possible on this machine; an arm differs in"
        " more than its swap"
    ),
    3: "a plugin is missing, broken, or breaks its interface",
    4: "data or a tokenizer cannot be read",
    5: "a checkpoint cannot be written, read or continued",
    6: "training is not finite",
    7: "memory or disk is too small, or the processes cannot share the batch",
    8: (
        "runs of an ablation, or items of `bench --acceptance`, failed; the report is written and"
        " says which"
    ),
    70: "a bug",
    73: "another process holds the directory",
    75: "stopped and saved, or another process of the run was lost: the same command resumes",
    130: "interrupted where there is nothing to save",
    141: "the output's pipe was closed",
}


class LswtError(Exception):
    """Base of all errors that a user can fix; anything else is a bug (exit code 70)."""

    exit_code = 70


class UsageError(LswtError):
    """A command-line argument is invalid."""

    exit_code = 2


class PluginError(LswtError):
    """A plugin is missing, fails to import, conflicts with another or violates its interface."""

    exit_code = 3


class Incompatible(LswtError):
    """Valid components or options are incompatible with each other or with this machine."""

    exit_code = 2


class DataError(LswtError):
    """Data or a tokenizer cannot be read, is empty, or differs from the checkpoint's."""

    exit_code = 4


class CheckpointError(LswtError):
    """A checkpoint cannot be written, read or resumed."""

    exit_code = 5


class NumericsError(LswtError):
    """Training produced NaN or infinity."""

    exit_code = 6


class ResourceError(LswtError):
    """Memory, disk space or processes do not suffice."""

    exit_code = 7


class RunsFailed(LswtError):
    """Runs of an ablation, or items of an acceptance, failed; the report says which, and why."""

    exit_code = 8


class BusyError(LswtError):
    """Another process has locked the run directory."""

    exit_code = 73


class Preempted(LswtError):
    """The run was asked to stop and has saved a checkpoint to resume from."""

    exit_code = 75


class RankLost(LswtError):
    """Another process of the run was lost, or ended with an error of its own."""

    exit_code = 75

    def __init__(self, reason: str, rank: int, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason, self.rank = reason, rank  # -1: torchrun itself


@dataclass(frozen=True)
class Problem:
    """One problem of a recipe: ``where`` is "file:line" or "command line", ``source`` the line's
    text.
    """

    what: str
    where: str
    why: str
    fix: str
    source: str = ""

    def __str__(self) -> str:
        arrow = f"  --> {self.where}" + (f"   {self.source}" if self.source else "")
        return f"error: {self.what}\n{arrow}\n  why: {self.why}\n  fix: {self.fix}"


class RecipeError(LswtError):
    """All problems of a recipe together."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n\n".join(str(problem) for problem in self.problems))
