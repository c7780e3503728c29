"""Recall tasks: what one segment says is asked for in a later one, and the answers alone are
scored. A model that remembers nothing between segments is at chance, by construction.
"""

from __future__ import annotations

from lswt_core.hooks import hookimpl
from lswt_recall.integers import Integers
from lswt_recall.tasks import AssociativeRecall, Copy, Induction, Phonebook


@hookimpl
def lswt_components() -> list[type]:
    """Offer the tasks and their tokenizer."""
    return [AssociativeRecall, Copy, Induction, Phonebook, Integers]
