"""Nested values, such as optimizer state, as a JSON outline and named tensors, without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lswt_core.errors import CheckpointError

TENSOR, LIST, TUPLE, DICT, NUMBER = "$tensor", "$list", "$tuple", "$dict", "$number"


def outline(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors are added to ``tensors``, named by their path.

    Supports tensors, None, bool, int, float, str, and lists, tuples and dicts (keys str or int) of
    those. Raises CheckpointError, with the path, for anything else.
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
        pairs = []
        for key, item in value.items():
            require_json_key(key, path)
            pairs.append([key, outline(item, f"{path}/{escape_key(key)}", tensors)])
        return {DICT: pairs}
    raise CheckpointError(
        f"{path} cannot be saved: it is of type {type(value).__name__}; "
        "a checkpoint stores tensors, numbers, strings, None, and lists, tuples and dicts of those"
    )


def fill_outline(outlined: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of an ``outline``."""
    match outlined:
        case {"$tensor": str(path)}:
            return tensors[path]
        case {"$number": str(text)}:
            return float(text)
        case {"$list": list(items)}:
            return [fill_outline(item, tensors) for item in items]
        case {"$tuple": list(items)}:
            return tuple(fill_outline(item, tensors) for item in items)
        case {"$dict": list(pairs)}:
            return {key: fill_outline(item, tensors) for key, item in pairs}
    return outlined


def require_json_key(key: Any, path: str) -> None:
    """Raise CheckpointError for a key that JSON does not preserve."""
    if type(key) not in (str, int):
        raise CheckpointError(
            f"{path} cannot be saved: it has a key of type {type(key).__name__}; keys are strings"
            " or integers"
        )


def escape_key(key: str | int) -> str:
    """Escape "/" in a key, as in a JSON pointer (RFC 6901)."""
    return str(key).replace("~", "~0").replace("/", "~1")


def unescape_key(escaped: str) -> str:
    """Undo ``escape_key``."""
    return escaped.replace("~1", "/").replace("~0", "~")
