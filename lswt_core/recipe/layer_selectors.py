"""Selectors of layers, as in a recipe's tables [layers.SELECTOR]: "0-3,8", "every 4"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

LAYERS = "layers"
# tables that may differ from layer to layer
LAYERED = ("block", "mixer", "positional", "memory", "attention", "qk_norm", "ffn", "norm")
MODEL_KINDS = ("head", *LAYERED)  # kinds of component that an exported model consists of
GRAMMAR = (
    'layers are numbered from 0; write e.g. "3", "0-3", "0-3,8", "every 4" (the last of every four)'
    ' or "every 4 from 0"'
)
SPAN = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
EVERY = re.compile(r"every\s+(\d+)(?:\s+from\s+(\d+))?")


def select(selector: str, n_layers: int) -> list[int]:
    """Return the layers of a selector, sorted. Raises ValueError if it is malformed, or names a
    layer that the model does not have, or none.

    "every N" is the last layer of every N, as interleaved models count ("every 4": layers 3, 7, 11,
    ...); "every N from K" begins at layer K.
    """
    layers: set[int] = set()
    for term in selector.split(","):
        layers |= set(select_term(term.strip(), n_layers))
    return sorted(layers)


def select_term(piece: str, n_layers: int) -> range:
    """The layers of one comma-separated term of a selector."""
    if match := SPAN.fullmatch(piece):
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f'"{piece}" ends before it begins')
        layers = range(first, last + 1)
    elif match := EVERY.fullmatch(piece):
        stride = int(match[1])
        if stride < 1:
            raise ValueError(f'"{piece}" selects no layers: its stride is 0')
        first = stride - 1 if match[2] is None else int(match[2])
        layers = range(first, n_layers, stride)
    else:
        raise ValueError(f'"{piece}" is no choice of layers')
    if not layers or layers[-1] >= n_layers:
        raise ValueError(f'"{piece}" is not in a model of {n_layers} layers (0 to {n_layers - 1})')
    return layers


def spell(layers: Iterable[int]) -> str:
    """Return the selector of some layers: "0-3,7"."""
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def tables_at(tables: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The LAYERED tables of a resolved recipe as they apply to one layer."""
    merged = {name: tables[name] for name in LAYERED if name in tables}
    for selector, own in tables.get(LAYERS, {}).items():
        if layer in select(selector, tables["model"]["n_layers"]):
            memories = {**merged.get("memory", {}), **own.get("memory", {})}
            merged |= own
            merged["memory"] = {name: one for name, one in memories.items() if one is not False}
    return merged
