"""Writes plain tables as TOML, and hashes them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.registry.kinds import KIND_OF_TABLE

BARE = re.compile(r"[A-Za-z0-9_-]+")
ESCAPES = {
    "\\": "\\\\",
    '"': '\\"',
    "\b": "\\b",
    "\t": "\\t",
    "\n": "\\n",
    "\f": "\\f",
    "\r": "\\r",
}


def document(tables: Mapping[str, Any]) -> str:
    """A TOML document: one section for every table that holds values."""
    sections = [
        section for name, table in tables.items() for section in section_texts((name,), table)
    ]
    return "\n".join(sections)


def section_texts(path: tuple[str, ...], table: Mapping[str, Any]) -> list[str]:
    """The sections of a table: its own values under its header, then its tables."""
    own = {name: item for name, item in table.items() if not isinstance(item, Mapping)}
    inner = [
        text
        for name, item in table.items()
        if isinstance(item, Mapping)
        for text in section_texts((*path, name), item)
    ]
    header = f"[{'.'.join(map(key, path))}]\n"
    body = "".join(f"{key(name)} = {value(item)}\n" for name, item in own.items())
    if own or not inner:
        return [header + body, *inner]
    return inner


def key(name: str) -> str:
    """A key, quoted if necessary."""
    return name if BARE.fullmatch(name) else value(name)


def value(item: Any) -> str:
    """A value in TOML's notation."""
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, str):
        return f'"{"".join(map(escape, item))}"'
    if isinstance(item, list | tuple):
        return f"[{', '.join(map(value, item))}]"
    if isinstance(item, Mapping):
        pairs = (f"{key(str(name))} = {value(inner)}" for name, inner in item.items())
        return f"{{{', '.join(pairs)}}}"
    return repr(item) if isinstance(item, int | float) else str(item)


def escape(letter: str) -> str:
    """A character as it stands in a basic string of TOML."""
    if letter in ESCAPES:
        return ESCAPES[letter]
    if ord(letter) < 32 or ord(letter) == 127:
        return f"\\u{ord(letter):04X}"
    return letter


def fingerprint(tables: Mapping[str, Any]) -> str:
    """A hash of the content; the order of keys counts for stacked components alone."""
    text = json.dumps(with_order(tables), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def with_order(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables, with those of components that stack as lists, whose order JSON keeps."""
    ordered: dict[str, Any] = {}
    for name, table in tables.items():
        if name in KIND_OF_TABLE and KIND_OF_TABLE[name].many:
            ordered[name] = list(table.items())
        elif name == LAYERS:
            ordered[name] = {selector: with_order(own) for selector, own in table.items()}
        else:
            ordered[name] = table
    return ordered


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables: {"a.b": value} for every value."""
    leaves: dict[str, Any] = {}
    for name, item in tables.items():
        path = f"{prefix}{key(name)}"
        if isinstance(item, Mapping):
            leaves |= flat(item, f"{path}.")
        else:
            leaves[path] = item
    return leaves
