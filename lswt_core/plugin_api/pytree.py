"""Nested dicts and tuples of tensors, the shape of memory states: mapped, and flattened to named
tensors for files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """The same tree with every tensor replaced by ``function(tensor)``."""
    match tree:
        case None:
            return None
        case Tensor():
            return function(tree)
        case dict():
            return {key: tree_map(function, branch) for key, branch in tree.items()}
        case tuple() | list() if not hasattr(tree, "_fields"):
            return tuple(tree_map(function, branch) for branch in tree)
    raise TypeError(
        "a memory's state is None, a tensor, or nested dicts and tuples of those, not"
        f" {type(tree).__name__}"
    )


def kept(state: Any) -> Any:
    """A state as it is kept until the next call: without its graph, and every tensor alone and
    contiguous in its memory. Memories may return views, such as the last tokens of a longer tensor,
    or keys and values of a product that queries are part of; kept as they are, those would hold all
    of it.
    """
    return tree_map(alone, state)


def alone(tensor: Tensor) -> Tensor:
    """A tensor without its graph, copied unless its memory is its own."""
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of a tree, in order."""
    found: list[Tensor] = []
    tree_map(lambda tensor: found.append(tensor) or tensor, tree)  # type: ignore[func-returns-value]
    return found


def flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Named tensors, and the tree as JSON with each tensor replaced by its name."""
    named: dict[str, Tensor] = {}

    def outline(branch: Any, path: str) -> Any:
        match branch:
            case None:
                return None
            case Tensor():
                named[path] = branch
                return path
            case dict():
                return {key: outline(value, f"{path}.{key}") for key, value in branch.items()}
        return [outline(value, f"{path}.{i}") for i, value in enumerate(branch)]

    return named, outline(tree_map(lambda tensor: tensor, tree), prefix)


def unflatten(outline: Any, named: dict[str, Tensor]) -> Any:
    """The tree that ``flatten`` took apart."""
    match outline:
        case None:
            return None
        case str():
            return named[outline]
        case dict():
            return {key: unflatten(branch, named) for key, branch in outline.items()}
    return tuple(unflatten(branch, named) for branch in outline)


def split_rows(tree: Any, rows: int, size: int) -> list[Any]:
    """A tree over ``rows`` rows cut into trees over ``size`` rows each."""
    return [tree_map(lambda tensor, i=i: tensor[i : i + size], tree) for i in range(0, rows, size)]  # type: ignore[misc]


def join_rows(trees: list[Any]) -> Any:
    """Trees over some rows each put together into one."""
    columns = iter(list(zip(*map(tensors, trees), strict=True)))
    return tree_map(lambda _: torch.cat(next(columns)), trees[0])
