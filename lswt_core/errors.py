"""The errors a user can meet: each says what, where, why and what to do, and carries the exit code
of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# What the exit codes of the command line mean; README has the same table.
EXIT_CODES = {
    0: "done; of `ablate`: no run has failed",
    2: "the command or the recipe cannot be, or not on this machine; an arm is no clean swap",
    3: "a plugin is missing, broken, or breaks its interface",
    4: "data or a tokenizer cannot be read",
    5: "a checkpoint cannot be written, read or continued",
    6: "training is not finite",
    7: "memory or disk is too small",
    8: "runs of an ablation failed; its report is written and says which",
    70: "a bug",
    73: "another process holds the directory",
    75: "stopped and saved: the same command goes on",
    130: "interrupted where there is nothing to save",
    141: "the reader of the output has left",
}


class LswtError(Exception):
    """Base of every error that is the user's to mend; anything else is a bug (exit code 70)."""

    exit_code = 70


class UsageError(LswtError):
    """A command was given an argument that it cannot take."""

    exit_code = 2


class PluginError(LswtError):
    """A plugin is missing, broken, clashes with another or breaks its interface."""

    exit_code = 3


class Incompatible(LswtError):
    """Components or options that are each valid do not go together, or not with this machine."""

    exit_code = 2


class DataError(LswtError):
    """Data or a tokenizer cannot be read, is empty, or differs from the checkpoint's."""

    exit_code = 4


class CheckpointError(LswtError):
    """A checkpoint cannot be written, read or continued."""

    exit_code = 5


class NumericsError(LswtError):
    """Training produced numbers that are not finite."""

    exit_code = 6


class ResourceError(LswtError):
    """Memory or disk is too small for what was asked."""

    exit_code = 7


class RunsFailed(LswtError):
    """Runs of an ablation failed; its report is written and says which, and why."""

    exit_code = 8


class BusyError(LswtError):
    """Another process holds the run directory."""

    exit_code = 73


class Preempted(LswtError):
    """The run was asked to stop, has saved, and can be resumed."""

    exit_code = 75


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: ``where`` is "file:line" or "command line", ``source`` the
    text that stands there.
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
    """Everything that is wrong with a recipe, at once."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n\n".join(str(problem) for problem in self.problems))
