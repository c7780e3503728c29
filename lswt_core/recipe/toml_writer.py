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
    """A TOML document: one section per table that holds values."""
    sections = [
        section for name, table in tables.items() for section in section_texts((name,), table)
    ]
    return "\n".join(sections)


def section_texts(path: tuple[str, ...], table: Mapping[str, Any]) -> list[str]:
    """A table's own values under its header, then its tables."""
    own = {name: item for name, item in table.items() if not isinstance(item, Mapping)}
    inner = [
        text
        for name, item in table.items()
        if isinstance(item, Mapping)
        for text in section_texts((*path, name), item)
    ]
    header = f"[{'.'.join(map(key, path))}]\n"
    body = "".join(f"{key(name)} = {value(item)}\n" for name, item in own.items())
    return [header + body, *inner] if own or not inner else inner


def key(name: str) -> str:
    """A key, quoted if need be."""
    return name if BARE.fullmatch(name) else value(name)


def value(item: Any) -> str:
    """A value in TOML's notation."""
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, str):
        return (
            '"'
            + "".join(
                ESCAPES.get(c) or (f"\\u{ord(c):04X}" if ord(c) < 32 or ord(c) == 127 else c)
                for c in item
            )
            + '"'
        )
    if isinstance(item, list | tuple):
        return f"[{', '.join(map(value, item))}]"
    if isinstance(item, Mapping):
        return (
            "{"
            + ", ".join(f"{key(str(name))} = {value(inner)}" for name, inner in item.items())
            + "}"
        )
    return repr(item) if isinstance(item, int | float) else str(item)


def fingerprint(tables: Mapping[str, Any]) -> str:
    """A hash of the content; the order of keys counts for stacked components alone."""
    return hashlib.sha256(
        json.dumps(ordered(tables), sort_keys=True, allow_nan=False).encode()
    ).hexdigest()


def ordered(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with those of stacked components as lists."""
    stacked = {name for name, kind in KIND_OF_TABLE.items() if kind.many}
    held = {
        name: list(table.items()) if name in stacked else table for name, table in tables.items()
    }
    return (
        held
        | {
            LAYERS: {
                selector: ordered(special) for selector, special in tables.get(LAYERS, {}).items()
            }
        }
        if LAYERS in held
        else held
    )


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} for every value."""
    found: dict[str, Any] = {}
    for name, item in tables.items():
        found |= (
            flat(item, f"{prefix}{key(name)}.")
            if isinstance(item, Mapping)
            else {f"{prefix}{key(name)}": item}
        )
    return found
