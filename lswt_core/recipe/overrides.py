"""Reads ``a.b.c=value`` words of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, time
from typing import Any

import tomli

from lswt_core.errors import Problem
from lswt_core.recipe.provenance import Branch, Builder, Origin, join_tables
from lswt_core.recipe.toml_lines import Key, parse_key

PLACE = "command line"


def read_overrides(words: Sequence[str], rank: int, problems: list[Problem]) -> Branch:
    """All overrides as one layer, so that options may stand before or after the ``use`` they belong
    to.
    """
    layer = Branch("", {}, Origin(PLACE, ""), rank)
    for word in words:
        text, equals, value = word.partition("=")
        key = parse_key(text.strip())
        if not equals or key is None or key == ("extends",):
            why = (
                "recipes are extended in files only"
                if key == ("extends",)
                else "it does not read key=value"
            )
            problems.append(
                Problem(f"cannot use the word {word!r}", PLACE, why, "write e.g. train.steps=100")
            )
            continue
        origin = Origin(PLACE, word)
        table = Builder(lambda _, origin=origin: origin, rank, problems).branch(
            nest(key, parse_value(value))
        )  # type: ignore[misc]
        layer = join_tables(layer, table)
    return layer


def nest(key: Key, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the key a.b."""
    for part in reversed(key):
        value = {part: value}
    return value


def parse_value(text: str) -> Any:
    """A TOML value, or else the text itself, so that quotes may be left out."""
    try:
        parsed = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed.pop("value")
    return text if parsed or isinstance(value, date | datetime | time) else value
