"""The errors a user can meet: each says what, where, why and what to do, and carries the exit code
of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
    """Data or a tokenizer cannot be read, is empty, or is not what the checkpoint was trained on."""

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
