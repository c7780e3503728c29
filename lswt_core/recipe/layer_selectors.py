"""Which layers a recipe's table [layers.SELECTOR] is about, and what holds for one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

LAYERS = "layers"
# tables that may differ from layer to layer
LAYERED = ("positional", "memory", "attention", "qk_norm", "ffn", "norm")
GRAMMAR = (
    'layers are numbered from 0; write e.g. "3", "0-3", "0-3,8", "every 4" (the last of every four)'
    ' or "every 4 from 0"'
)
SPAN = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
EVERY = re.compile(r"every\s+(\d+)(?:\s+from\s+(\d+))?")


def select(selector: str, n_layers: int) -> list[int]:
    """The layers a selector names, in order; raises ValueError where it names one that is not
    there, or none.

    "every N" is the last layer of every N, as interleaved models count ("every 4": layers 3, 7, 11,
    ...); "every N from K" begins at layer K.
    """
    found: set[int] = set()
    for piece in selector.split(","):
        found |= set(chosen_by(piece.strip(), n_layers))
    return sorted(found)


def chosen_by(piece: str, n_layers: int) -> range:
    """The layers of one piece of a selector."""
    if match := SPAN.fullmatch(piece):
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f'"{piece}" ends before it begins')
        layers = range(first, last + 1)
    elif match := EVERY.fullmatch(piece):
        stride = int(match[1])
        if stride < 1:
            raise ValueError(f'"{piece}" never moves on')
        layers = range(stride - 1 if match[2] is None else int(match[2]), n_layers, stride)
    else:
        raise ValueError(f'"{piece}" is no choice of layers')
    if not layers or layers[-1] >= n_layers:
        raise ValueError(f'"{piece}" is not in a model of {n_layers} layers (0 to {n_layers - 1})')
    return layers


def spell(layers: Iterable[int]) -> str:
    """The selector of some layers: "0-3,7"."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def tables_at(tables: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """A resolved recipe's LAYERED tables as they hold for one layer."""
    held = {name: tables[name] for name in LAYERED if name in tables}
    for selector, special in tables.get(LAYERS, {}).items():
        if layer in select(selector, tables["model"]["n_layers"]):
            held |= {name: table for name, table in special.items() if name != "memory"}
            memories = {**held.get("memory", {}), **special.get("memory", {})}
            held["memory"] = {name: table for name, table in memories.items() if table is not False}
    return held
