"""Checks of memories."""

from __future__ import annotations

from lswt_core.conformance.check import Violation, require, rule
from lswt_core.conformance.subject import Subject
from lswt_core.conformance.tensors import EXACT, max_difference, random_tokens
from lswt_core.plugin_api.pytree import tree_leaves


@rule(
    "memory state",
    ("memory",),
    why=(
        "the core detaches, saves, moves and shards the states of memories without knowing what"
        " they mean"
    ),
    fix=(
        "return None, a tensor, or nested dicts (string keys) and tuples of tensors, detached, the"
        " batch row as first dimension"
    ),
    after=("shapes",),
)
def state_is_a_pytree(subject: Subject) -> None:
    """States are pytrees of detached tensors, batch row first; a row's state depends on that row
    alone.
    """
    decoder, ids = subject.decoder(), random_tokens(3, 4)
    try:
        leaves = tree_leaves(decoder(ids, decoder(ids)[1])[1])
    except TypeError as error:
        raise Violation(str(error)) from error
    shapes = [list(leaf.shape) for leaf in leaves]
    require(
        all(shape[:1] == [3] for shape in shapes),
        f"the state of 3 rows has tensors of shapes {shapes}",
    )
    require(not any(leaf.requires_grad for leaf in leaves), "tensors of the state require grad")
    all_rows = tree_leaves(decoder(ids)[1])
    for row in range(3):
        one_row = tree_leaves(decoder(ids[row : row + 1])[1])
        for own, shared in zip(one_row, all_rows, strict=True):
            require(
                max_difference(own, shared[row : row + 1]) <= EXACT,
                f"the state of row {row} depends on other rows",
            )
