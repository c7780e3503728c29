"""Nested dicts and tuples of tensors, which memory states are: map, detach, flatten to named
tensors, split and concatenate by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return the tree with every tensor replaced by ``function(tensor)``; lists become tuples.
    Raises TypeError for anything but None, tensors, dicts, tuples and lists.
    """
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


def detach_state(state: Any) -> Any:
    """Detach a memory state that is kept until the next call, and copy views out of larger
    tensors (the last tokens of a longer tensor, keys and values of a fused product), which would
    otherwise stay allocated.
    """
    return tree_map(detach_compact, state)


def detach_compact(tensor: Tensor) -> Tensor:
    """Detach a tensor; copy it unless it is contiguous and owns all of its storage."""
    tensor = tensor.detach()
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def tree_leaves(tree: Any) -> list[Tensor]:
    """Every tensor of a tree, in order."""
    leaves: list[Tensor] = []
    tree_map(lambda tensor: leaves.append(tensor) or tensor, tree)  # type: ignore[func-returns-value]
    return leaves


def flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Return named tensors, and the tree as JSON data with each tensor replaced by its name."""
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
    """Rebuild the tree that ``flatten`` took apart."""
    match outline:
        case None:
            return None
        case str():
            return named[outline]
        case dict():
            return {key: unflatten(branch, named) for key, branch in outline.items()}
    return tuple(unflatten(branch, named) for branch in outline)


def split_rows(tree: Any, rows: int, size: int) -> list[Any]:
    """Split a tree of tensors with ``rows`` rows into trees of ``size`` rows each."""
    return [tree_map(lambda tensor, i=i: tensor[i : i + size], tree) for i in range(0, rows, size)]  # type: ignore[misc]


def concatenate_rows(trees: list[Any]) -> Any:
    """Concatenate trees along the rows of their tensors."""
    columns = iter(list(zip(*map(tree_leaves, trees), strict=True)))
    return tree_map(lambda _: torch.cat(next(columns)), trees[0])
