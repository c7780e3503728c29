"""A plugin whose import has an effect on the whole process."""

from __future__ import annotations

import random

from mutants.expected import MUTANTS, caught_by

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Schedule

random.seed(1234)


@caught_by("import effects")
class SeedsAtImport(Schedule):
    """Its module seeds Python's global generator."""

    name = "seeds-at-import"

    def factor(self, step: int) -> float:
        return 1.0


MUTANTS.remove(SeedsAtImport)  # offered here


@hookimpl
def lswt_components() -> list[type]:
    """The mutant."""
    return [SeedsAtImport]
