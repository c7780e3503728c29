"""Suggest the valid name for a misspelled one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def distance(one: str, other: str) -> int:
    """Optimal string alignment distance: insertions, deletions, replacements and transpositions."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, target in enumerate(other, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != target))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == target:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name within two edits (one in short words), else the most similar one, else None."""
    names = sorted(names)
    limit = min(2, (len(word) + 1) // 3)
    closest = min(
        ((distance(word, name), name) for name in names if abs(len(name) - len(word)) <= limit),
        default=None,
    )
    if closest is not None and closest[0] <= limit:
        return closest[1]
    similar = get_close_matches(word[:100], names, n=1, cutoff=0.6)
    return similar[0] if similar else None
