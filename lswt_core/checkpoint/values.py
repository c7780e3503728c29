"""Nested values, such as an optimizer's state, as JSON with the tensors beside it; never a pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lswt_core.errors import CheckpointError

TENSOR, LIST, TUPLE, DICT, NUMBER = "$tensor", "$list", "$tuple", "$dict", "$number"


def outline(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors are put into ``tensors``, named by their path.

    Raises CheckpointError, with the path, for what is no tensor, None, bool, whole number, float or
    text, nor a list, a tuple or a dict (keys texts or whole numbers) of such.
    """
    if isinstance(value, Tensor):
        tensors[path] = value
        return {TENSOR: path}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        # JSON has no infinity
        return float(value) if math.isfinite(value) else {NUMBER: str(value)}
    if type(value) in (list, tuple):
        items = [outline(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {LIST if type(value) is list else TUPLE: items}
    if type(value) is dict:
        pairs = [(key_of(key, path), item, f"{path}/{escaped(key)}") for key, item in value.items()]
        return {DICT: [[key, outline(item, below, tensors)] for key, item, below in pairs]}
    raise CheckpointError(
        f"{path} cannot be saved: it is of type {type(value).__name__}; "
        "a checkpoint holds tensors, numbers, texts, None, and lists, tuples and dicts of those"
    )


def filled(outlined: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that ``outline`` took apart."""
    match outlined:
        case {"$tensor": str(path)}:
            return tensors[path]
        case {"$number": str(text)}:
            return float(text)
        case {"$list": list(items)}:
            return [filled(item, tensors) for item in items]
        case {"$tuple": list(items)}:
            return tuple(filled(item, tensors) for item in items)
        case {"$dict": list(pairs)}:
            return {key: filled(item, tensors) for key, item in pairs}
    return outlined


def key_of(key: Any, path: str) -> str | int:
    """A key that JSON gives back as it was; raises CheckpointError for any other."""
    if type(key) in (str, int):
        found: str | int = key
        return found
    raise CheckpointError(
        f"{path} cannot be saved: it has a key of type {type(key).__name__}; keys are texts or"
        " whole numbers"
    )


def escaped(key: str | int) -> str:
    """A key as a part of a path, which "/" separates (RFC 6901)."""
    return str(key).replace("~", "~0").replace("/", "~1")


def unescaped(part: str) -> str:
    """The key of a part of a path."""
    return part.replace("~1", "/").replace("~0", "~")
