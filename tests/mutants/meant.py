"""What is known of every mutant."""

from __future__ import annotations

from typing import Any

CITED = "@misc{mutant, title={A mutant}}"
MEANT: dict[str, str] = {}  # class name -> check
OFFERED: list[type] = []


def meant(check: str) -> Any:
    """Note which check is to find a class."""

    def note(cls: type) -> type:
        MEANT[cls.__name__] = check
        OFFERED.append(cls)
        return cls

    return note
