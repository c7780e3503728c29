"""Read overrides, ``a.b.c=value`` words of the command line."""

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
    """Return all overrides as one layer: options may stand before or after their ``use``."""
    layer = Branch("", {}, Origin(PLACE, ""), rank)
    for word in words:
        table = read_override(word, rank, problems)
        if table is not None:
            layer = join_tables(layer, table)
    return layer


def read_override(word: str, rank: int, problems: list[Problem]) -> Branch | None:
    """One override as a tree; None, with a problem, if it does not read key=value."""
    text, equals, value = word.partition("=")
    key = parse_key(text.strip())
    if not equals or key is None or key == ("extends",):
        why = "it does not read key=value"
        if key == ("extends",):
            why = "recipes are extended in files only"
        fix = "write e.g. train.steps=100"
        problems.append(Problem(f"cannot use the word {word!r}", PLACE, why, fix))
        return None
    origin = Origin(PLACE, word)
    return Builder(lambda _: origin, rank, problems).branch(nest(key, parse_value(value)))


def nest(key: Key, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for the key a.b."""
    for part in reversed(key):
        value = {part: value}
    return value


def parse_value(text: str) -> Any:
    """Parse a TOML value; return the text itself if it is none, so quotes may be left out."""
    try:
        parsed = tomli.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed.pop("value")
    return text if parsed or isinstance(value, date | datetime | time) else value
