"""Checks of the states of memories, mixers, blocks and feed-forward layers."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.conformance.check import Violation, require, rule
from lswt_core.conformance.subject import DIMS, STATE_KINDS, Subject
from lswt_core.conformance.tensors import (
    EXACT,
    VOCAB_SIZE,
    max_difference,
    random_normal,
    random_tokens,
)
from lswt_core.interfaces import LayerContext, Mixer, State, StatefulFeedForward
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.pytree import tree_leaves

LONGEST_REPLAY = 2048  # tokens


@rule(
    "state",
    STATE_KINDS,
    why="the core detaches, saves, moves and shards states without knowing what they mean",
    fix=(
        "return None, a tensor, or nested dicts (string keys) and tuples of tensors, the batch row"
        " as first dimension; a memory detaches them"
    ),
    after=("in-place writes", "row independence"),
)
def state_is_a_pytree(subject: Subject) -> None:
    """States are pytrees of tensors, batch row first, those of memories detached; a row's state
    depends on that row alone.
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
    if subject.kind == "memory":
        require(not any(leaf.requires_grad for leaf in leaves), "tensors of the state require grad")
    all_rows = tree_leaves(decoder(ids)[1])
    for row in range(3):
        one_row = tree_leaves(decoder(ids[row : row + 1])[1])
        for own, shared in zip(one_row, all_rows, strict=True):
            require(
                max_difference(own, shared[row : row + 1]) <= EXACT,
                f"the state of row {row} depends on other rows",
            )


@rule(
    "reach",
    ("memory", "mixer", "ffn"),
    why=(
        "a run that resumes elsewhere rebuilds bounded states by replaying tokens, and memory is"
        " planned by what is declared"
    ),
    fix=(
        "set `reach` (of a memory `length`) to the number of tokens that the state depends on, and"
        " drop older ones; None if it depends on all of the past; 0 if there is no state"
    ),
    after=("segment invariance",),
)
@torch.no_grad()
def replay_rebuilds_the_state(subject: Subject) -> None:
    """The state after a long text is that of its last ``reach`` tokens alone."""
    if subject.segment_dependent:
        raise SkipTest("its state depends on positions, or on how a text is split")
    if subject.kind == "ffn" and not subject.is_stateful_ffn:
        raise SkipTest("it has no state")
    layer, context = one_layer(subject)
    reach = layer.reach
    if reach is None or reach > LONGEST_REPLAY:
        raise SkipTest("its state depends on all of the past, or on too much of it")
    x = random_normal(2, 2 * reach + 24, DIMS.d_model)
    state: State = None
    for part in x.split(12, dim=1):
        state = run_layer(layer, part, state, context)
    found = tree_leaves(state)
    expected = tree_leaves(run_layer(layer, x[:, -reach:], None, context)) if reach else []
    shapes = [[list(leaf.shape) for leaf in leaves] for leaves in (found, expected)]
    require(
        shapes[0] == shapes[1],
        f"after {x.shape[1]} tokens the state has tensors {shapes[0]}; its reach is {reach}, but"
        f" the last {reach} tokens alone give {shapes[1]}",
    )
    error = max(map(max_difference, found, expected), default=0.0)
    require(
        error <= EXACT,
        f"replaying the last {reach} tokens, its reach, gives a state that is {error:.2g} off",
    )


def one_layer(subject: Subject) -> tuple[Any, LayerContext]:
    """The layer that has the state, a mixer or a feed-forward layer, and its context without
    positions.
    """
    decoder = subject.decoder(DIMS._replace(n_layers=1))
    kind = StatefulFeedForward if subject.kind == "ffn" else Mixer
    layers = [layer for layer in decoder.layers() if isinstance(layer, kind)]
    if any(layer.reads for layer in layers):
        raise SkipTest("it reads what other layers write")
    return layers[0], LayerContext(torch.arange(0), None, decoder.positional, {})


def run_layer(layer: Any, x: Tensor, state: State, context: LayerContext) -> State:
    """The next state after inputs x [B, T, M]."""
    return layer(x, state, context._replace(positions=torch.arange(x.shape[1]))).state


@rule(
    "documents",
    (*STATE_KINDS, "positional"),
    why=(
        "packed rows hold several documents; one that sees another is trained on a text that does"
        " not exist"
    ),
    fix=(
        "hide tokens before context.first_visible, and reset a recurrent state before a token whose"
        " first_visible is its own position (lswt_core.plugin_api.softmax_attention and .recurrence"
        " do both)"
    ),
    after=("segment invariance", "state"),
)
@torch.no_grad()
def documents_do_not_see_each_other(subject: Subject) -> None:
    """With document masking, a document is read as if it were alone, whether it starts within a
    segment or with one.
    """
    starts = (5, 8)
    decoder, ids = subject.decoder(), random_tokens(2, 16)
    borders = document_starts(starts, 16)
    expected = read_documents(decoder, ids, borders)
    other = ids.where(borders > 0, (ids + 1) % VOCAB_SIZE)
    found = read_documents(decoder, other, borders)
    for row, start in enumerate(starts):
        error = max_difference(found[row, start:], expected[row, start:])
        require(error <= EXACT, f"the document before changes the next one, by {error:.2g}")
        if subject.segment_dependent is None:
            alone, _ = decoder(ids[row : row + 1, start:])
            error = max_difference(alone[0], expected[row, start:])
            require(error <= EXACT, f"a document alone differs by {error:.2g}")


def document_starts(starts: tuple[int, ...], length: int) -> Tensor:
    """Where the document of every token starts, [B, T]: each row has one at 0 and another."""
    second = torch.tensor(starts)[:, None]
    return torch.where(torch.arange(length) >= second, second, 0)


def read_documents(decoder: Decoder, ids: Tensor, borders: Tensor) -> Tensor:
    """Hidden states of ids [B, T] in segments of 4, with document masking."""
    outputs, state = [], None
    for first in range(0, ids.shape[1], 4):
        segment = slice(first, first + 4)
        states, state = decoder(ids[:, segment], state, borders[:, segment] - first)
        outputs.append(states)
    return torch.cat(outputs, dim=1)
