"""Which conformance check must catch which mutant."""

from __future__ import annotations

from typing import Any

CITATION = "@misc{mutant, title={A mutant}}"
EXPECTED_CHECK: dict[str, str] = {}  # class name -> name of the check
MUTANTS: list[type] = []


def caught_by(check: str) -> Any:
    """Register a class, and the only check that must fail for it."""

    def register(cls: type) -> type:
        EXPECTED_CHECK[cls.__name__] = check
        MUTANTS.append(cls)
        return cls

    return register
