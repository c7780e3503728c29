"""Checks of the model's components by the forward pass of a tiny decoder with a KV cache, in
float64 on the CPU.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, MODEL_KINDS, Subject
from lswt_core.conformance.tensors import (
    EXACT,
    VOCAB_SIZE,
    decode_segments,
    max_difference,
    random_tokens,
    seed_global_generators,
)
from lswt_core.model.decoder import Decoder


@rule(
    "randomness",
    MODEL_KINDS,
    why=(
        "all random numbers derive from (seed, step, row, purpose); a run that draws from a global"
        " generator cannot be resumed bit by bit"
    ),
    fix=(
        "draw nothing in forward; if you must, use a torch.Generator of your own, seeded by"
        " lswt_core.plugin_api.seeding.derive"
    ),
    after=("forward",),
)
def draws_nothing(subject: Subject) -> None:
    """A forward pass leaves the global generators of torch, numpy and Python as they were."""
    decoder = subject.decoder()
    seed_global_generators(5)
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # type: ignore[index]
    python_state = random.getstate()
    decode_segments(decoder, random_tokens(1, 8), 4)
    unchanged = {
        "torch": torch.equal(torch_state, torch.get_rng_state()),
        "numpy": np.array_equal(numpy_state, np.random.get_state()[1]),  # type: ignore[index]
        "random": python_state == random.getstate(),
    }
    drawn = [name for name, same in unchanged.items() if not same]
    require(not drawn, f"forward draws from the global generator of {', '.join(drawn)}")


@rule(
    "shapes",
    MODEL_KINDS,
    why=(
        "components compose by shape and dtype; one that silently widens doubles the memory of all"
        " that follow"
    ),
    fix="return the shape that the interface names, in the dtype of the input",
    after=("forward", "randomness", "in-place writes"),
)
def keeps_shape_and_dtype(subject: Subject) -> None:
    """Hidden states are [B, T, M] in the model's dtype, for one row and several, one token and
    several.
    """
    for dtype in (torch.float64, torch.float32):
        if subject.kind in ("ffn", "norm") and not subject.is_stateful_ffn:
            out = subject.module(dtype=dtype)(torch.ones(2, 3, DIMS.d_model, dtype=dtype))
            require(out.dtype == dtype, f"inputs in {dtype} give outputs in {out.dtype}")
        decoder = subject.decoder(dtype=dtype)
        for rows, length in ((1, 1), (3, 5), (2, 7)):
            states, _ = decoder(random_tokens(rows, length))
            batch = f"{rows} rows of {length} tokens"
            require(
                states.shape == (rows, length, DIMS.d_model),
                f"{batch} give hidden states {list(states.shape)}",
            )
            require(
                states.dtype == dtype, f"a model in {dtype} gives hidden states in {states.dtype}"
            )
            require(states.isfinite().all(), f"{batch} give hidden states that are not finite")


@rule(
    "causality",
    MODEL_KINDS,
    why="the loss of a model that sees the tokens it predicts means nothing",
    fix="let nothing of token t depend on tokens after t",
    after=("shapes", "reference", "position-wise"),
)
def is_causal(subject: Subject) -> None:
    """Changing token t changes its own hidden state and none before it, at the start of a text and
    after another segment.
    """
    decoder, ids = subject.decoder(), random_tokens(2, 9)
    require_causal(lambda tokens: decoder(tokens)[0], ids, "")

    def second_segment(tokens: Tensor) -> Tensor:
        _, state = decoder(random_tokens(2, 5, 3))
        states: Tensor = decoder(tokens, state)[0]
        return states

    require_causal(second_segment, ids, " of a text's second segment")


def require_causal(read: Callable[[Tensor], Tensor], ids: Tensor, where: str) -> None:
    """Change tokens of ids [B, 9], one at a time; ``read`` gives hidden states."""
    expected = read(ids)
    for t in (3, 6, 8):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % VOCAB_SIZE
        found = read(changed)
        error = max_difference(expected[:, :t], found[:, :t])
        require(
            error <= EXACT, f"hidden states before token {t}{where} depend on it, by {error:.2g}"
        )
        require(
            max_difference(expected[:, t], found[:, t]) > EXACT,
            f"the hidden state of token {t}{where} does not depend on it",
        )


@rule(
    "row independence",
    MODEL_KINDS,
    why=(
        "rows of a batch are different texts, and are split over micro-batches and data-parallel"
        " ranks"
    ),
    fix="compute every row from itself alone: no mean, norm or maximum over the batch dimension",
    after=("causality",),
)
def rows_are_independent(subject: Subject) -> None:
    """A row gives the same hidden states alone as within a batch, over two segments."""
    decoder, ids = subject.decoder(), random_tokens(3, 8)
    batched, _ = decode_segments(decoder, ids, 4)
    for row in range(3):
        alone, _ = decode_segments(decoder, ids[row : row + 1], 4)
        error = max_difference(alone, batched[row : row + 1])
        require(error <= EXACT, f"row {row} alone differs from itself in a batch by {error:.2g}")


@rule(
    "segment invariance",
    MODEL_KINDS,
    why=("training reads a text in segments; hidden states must not depend on where it is split"),
    fix=(
        "use positions, which number tokens from the start of the segment (negative in memory),"
        " never indices within a tensor"
    ),
    after=(
        "causality",
        "gradcheck",
        "attention bias",
        "state",
        "stateless",
        "reference",
    ),
)
def segments_do_not_matter(subject: Subject) -> None:
    """Segments of 1, 7 and all 17 tokens give the same hidden states."""
    if reason := subject.segment_dependent:
        raise SkipTest(reason)
    ids = random_tokens(2, 17)
    expected, _ = decode_segments(subject.decoder(), ids, 17)
    for segment in (1, 7):
        states, _ = decode_segments(subject.decoder(), ids, segment)
        error = max_difference(states, expected)
        require(error <= EXACT, f"segments of {segment} differ from one segment by {error:.2g}")


@rule(
    "stateless",
    MODEL_KINDS,
    why=(
        "a checkpoint saves the states that memories return; what a module stores on itself is lost"
        " and mixes texts"
    ),
    fix="return everything that is to be kept as state; assign nothing to self in forward",
    after=("shapes", "state", "reproducible initialisation"),
)
def keeps_state_nowhere_else(subject: Subject) -> None:
    """Two texts read in turns give what each gives alone, and a copy of the model continues from a
    state as the original does.
    """
    texts = [random_tokens(1, 12, seed) for seed in (1, 2)]
    expected = [decode_segments(subject.decoder(), ids, 4)[0] for ids in texts]
    decoder = subject.decoder()
    states: list[Any] = [None, None]
    for start in range(0, 12, 4):
        segment = slice(start, start + 4)
        for i, ids in enumerate(texts):
            out, states[i] = decoder(ids[:, segment], states[i])
            require(
                torch.equal(out, expected[i][:, segment]),
                "reading two texts in turns changes the hidden states of each",
            )
    fresh = subject.decoder()
    fresh.load_state_dict(copy.deepcopy(decoder.state_dict()))
    ids = random_tokens(1, 4, 9)
    require(
        torch.equal(fresh(ids, states[0])[0], decoder(ids, states[0])[0]),
        "a copy of the model continues differently from the same state",
    )
    require_no_counters(subject, decoder, ids, states[0])


def require_no_counters(subject: Subject, decoder: Decoder, ids: Tensor, state: Any) -> None:
    """The same call, once more, leaves the component's attributes and buffers as they were."""
    decoder(ids, state)
    before = attributes_of(subject, decoder)
    decoder(ids, state)
    after = attributes_of(subject, decoder)
    changed = [name for name in before if not same(before[name], after.get(name))]
    require(not changed, f"every call changes {', '.join(changed)} of the module")


def attributes_of(subject: Subject, decoder: Decoder) -> dict[str, Any]:
    """Copies of the numbers, tensors and buffers on the component's modules, and the lengths of
    lists, by name.
    """
    found: dict[str, Any] = {}
    for own in subject.own_modules(decoder):
        for path, module in own.named_modules():
            for key, value in (*vars(module).items(), *module._buffers.items()):
                name = f"{path}.{key}".lstrip(".")
                if isinstance(value, Tensor):
                    found.setdefault(name, value.detach().clone())
                elif isinstance(value, int | float):
                    found.setdefault(name, value)
                elif isinstance(value, list | dict | set) and not key.startswith("_"):
                    found.setdefault(f"the length of {name}", len(value))
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and max_difference(a.double(), b.double()) == 0
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


@rule(
    "state dict",
    MODEL_KINDS,
    why=(
        "checkpoints hold parameters and persistent buffers; all else that a forward pass needs"
        " must follow from the options"
    ),
    fix=(
        "make random tables persistent buffers or parameters, and let reset_parameters compute the"
        " others without drawing"
    ),
    after=("shapes", "reproducible initialisation"),
)
def state_dict_is_complete(subject: Subject) -> None:
    """A model of another seed that loads the state dict is the same model."""
    decoder, other = subject.decoder(seed=1), subject.decoder(seed=2)
    other.load_state_dict(decoder.state_dict())
    ids = random_tokens(2, 6)
    error = max_difference(decoder(ids)[0], other(ids)[0])
    require(error == 0, f"a model that loaded the state dict differs by {error:.2g}")
