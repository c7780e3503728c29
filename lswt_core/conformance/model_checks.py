"""Checks of the model's components, in a tiny decoder that remembers, in float64 on the CPU."""

from __future__ import annotations

import copy
import random
import warnings
from contextlib import suppress
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor

from lswt_core.conformance.check import Broken, require, rule
from lswt_core.conformance.subject import (
    DIMS,
    MODEL_KINDS,
    SMALL,
    VOCAB,
    Subject,
    distance,
    stream,
    tokens,
)
from lswt_core.interfaces import SlopeBias
from lswt_core.model.decoder import Decoder
from lswt_core.model.initialise import initialise
from lswt_core.plugin_api.pytree import tree_leaves, tree_map

EXACT = 1e-10  # float64, sums in another order


@rule(
    "meta",
    MODEL_KINDS,
    why=(
        "models are built without memory first, so that plans are free and large models load piece"
        " by piece"
    ),
    mend=(
        "register all tensors as parameters or buffers, and fill every one in"
        " reset_parameters(self)"
    ),
)
def built_without_memory(subject: Subject) -> None:
    """Everything is on the meta device after building, and nothing keeps what was in memory before
    initialisation.
    """
    empty = subject.empty()
    allocated = [
        name
        for name, t in (*empty.named_parameters(), *empty.named_buffers())
        if t.device.type != "meta"
    ]
    require(not allocated, f"allocated while building: {', '.join(allocated)}")
    decoder = empty.to_empty(device="cpu")
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        with torch.no_grad():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
    initialise(decoder, seed=1, std=0.02)
    left = [
        name
        for name, t in (*decoder.named_parameters(), *decoder.named_buffers())
        if t.isnan().any()
    ]
    require(not left, f"never filled after building: {', '.join(left)}")


@rule(
    "initialisation",
    MODEL_KINDS,
    why=(
        "arms of an ablation start bitwise equal where they share parameters, whatever else was"
        " drawn before"
    ),
    mend=(
        "draw in reset_parameters from torch's default generator alone, which the core seeds by the"
        " parameter's name"
    ),
    after=("meta",),
)
def reproducible(subject: Subject) -> None:
    """The same seed gives the same values, however other generators stand."""
    found = []
    for stand in (1, 2):
        seed_all(stand)
        decoder = subject.empty().to_empty(device="cpu")
        initialise(decoder, seed=3, std=0.02)
        found.append(
            {name: t.clone() for name, t in (*decoder.named_parameters(), *decoder.named_buffers())}
        )
    different = [name for name in found[0] if not torch.equal(found[0][name], found[1][name])]
    require(not different, f"the same seed gave other values in {', '.join(different)}")


def seed_all(stand: int) -> None:
    """Put every global generator somewhere."""
    random.seed(stand)
    np.random.seed(stand)
    torch.manual_seed(stand)


@rule(
    "randomness",
    MODEL_KINDS,
    why=(
        "all randomness is derived from (seed, step, row, purpose): a generator that moves makes"
        " runs differ when they are resumed"
    ),
    mend=(
        "draw nothing in forward; if you must, use lswt_core.plugin_api.seeding.derive_seed and a"
        " torch.Generator of your own"
    ),
    after=("meta",),
)
def draws_nothing(subject: Subject) -> None:
    """A forward pass leaves torch's, numpy's and Python's generators where they were."""
    decoder = subject.decoder()
    seed_all(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    stream(decoder, tokens(1, 8), 4)
    moved = [
        name
        for name, same in (
            ("torch", torch.equal(before[0], torch.get_rng_state())),
            ("numpy", bool((before[1] == np.random.get_state()[1]).all())),  # type: ignore[index]
            ("random", before[2] == random.getstate()),
        )
        if not same
    ]
    require(not moved, f"forward draws from the global generator of {', '.join(moved)}")


@rule(
    "shapes",
    MODEL_KINDS,
    why=(
        "parts fit together by shape and precision; one that silently widens doubles the memory of"
        " all that follow"
    ),
    mend="return the shape the interface names, in the type of the input",
    after=("meta", "randomness"),
)
def shapes(subject: Subject) -> None:
    """States [B, T, M] in the model's own precision, for one row and several, one token and
    several.
    """
    for dtype in (torch.float64, torch.float32):
        if subject.kind in ("ffn", "norm"):
            alone = subject.layer(dtype=dtype)(torch.ones(2, 3, DIMS.d_model, dtype=dtype))
            require(alone.dtype == dtype, f"{dtype} inputs give {alone.dtype} outputs")
        decoder = subject.decoder(dtype=dtype)
        for rows, length in ((1, 1), (3, 5), (2, 7)):
            states, _ = decoder(tokens(rows, length))
            require(
                states.shape == (rows, length, DIMS.d_model),
                f"states {list(states.shape)} of {rows} rows of {length} tokens",
            )
            require(states.dtype == dtype, f"a {dtype} model gives {states.dtype} states")
            require(
                states.isfinite().all(), f"states are not finite for {rows} rows of {length} tokens"
            )


@rule(
    "causality",
    MODEL_KINDS,
    why="a model that sees what it is to predict has a loss that means nothing",
    mend="let nothing that belongs to token t depend on tokens after t",
    after=("shapes", "oracle", "position-wise"),
)
def causal(subject: Subject) -> None:
    """Changing token t leaves all earlier states as they were, and changes its own."""
    decoder, ids = subject.decoder(), tokens(2, 9)
    before = decoder(ids)[0]
    for t in (3, 6, 8):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % VOCAB
        after = decoder(changed)[0]
        moved = distance(before[:, :t], after[:, :t])
        require(moved <= EXACT, f"states before token {t} change by {moved:.2g} when it changes")
        require(
            distance(before[:, t], after[:, t]) > EXACT,
            f"the state of token {t} does not depend on it",
        )


@rule(
    "rows",
    MODEL_KINDS,
    why="rows of a batch are different texts; micro-batches and processes split them as they like",
    mend="compute every row from itself alone: no mean, norm or maximum over the batch dimension",
    after=("causality",),
)
def rows_apart(subject: Subject) -> None:
    """A row gives the same alone as among others, memory included."""
    decoder, ids = subject.decoder(), tokens(3, 8)
    together = stream(decoder, ids, 4)[0]
    for row in range(3):
        moved = distance(stream(decoder, ids[row : row + 1], 4)[0], together[row : row + 1])
        require(moved <= EXACT, f"row {row} alone differs by {moved:.2g} from itself among others")


@rule(
    "gradcheck",
    MODEL_KINDS,
    why="a wrong derivative trains something else than what is written",
    mend="check custom backward functions, and keep float64 float64: no cast to float32 on the way",
    after=("causality", "oracle"),
)
def derivatives(subject: Subject) -> None:
    """Derivatives by inputs and by the component's parameters agree with differences, in float64."""
    decoder = subject.decoder(SMALL)
    names = [name for name, _ in subject.owned(decoder)]
    given = [dict(decoder.named_parameters())[name].detach().requires_grad_() for name in names]
    x = (
        torch.randn(
            1, 3, SMALL.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        * 0.7
    ).requires_grad_()
    for name in names:
        dict(decoder.named_parameters())[name].requires_grad_(False)

    def trunk(x: Tensor, *given: Tensor) -> Tensor:
        held = {f"decoder.{name}": value for name, value in zip(names, given, strict=True)}
        found: Tensor = torch.func.functional_call(Trunk(decoder), held, x)
        return found

    try:
        torch.autograd.gradcheck(trunk, (x, *given), fast_mode=True, check_batched_grad=False)
    except RuntimeError as error:
        raise Broken(" ".join(str(error).split())[:300]) from error


class Trunk(torch.nn.Module):
    """A decoder from its embedded inputs."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        return self.decoder.trunk(x)[0]


@rule(
    "streaming",
    MODEL_KINDS,
    why=(
        "training reads a text in segments; what a token means must not depend on where they"
        " are cut"
    ),
    mend=(
        "use coordinates, which number tokens from the segment's start (remembered ones are"
        " negative), never indices within a tensor"
    ),
    after=("causality", "gradcheck", "bias", "state", "hidden state", "oracle"),
)
def streams(subject: Subject) -> None:
    """Segments of 1, 7 and all tokens give the same states."""
    if reason := subject.cut_dependent:
        raise SkipTest(reason)
    ids = tokens(2, 17)
    whole = stream(subject.decoder(), ids, 17)[0]
    for size in (1, 7):
        moved = distance(stream(subject.decoder(), ids, size)[0], whole)
        require(moved <= EXACT, f"segments of {size} differ from one call by {moved:.2g}")


@rule(
    "hidden state",
    MODEL_KINDS,
    why=(
        "a checkpoint holds what is returned as state; what a module keeps for itself is lost, and"
        " mixes texts"
    ),
    mend="return everything that is to be remembered; assign nothing to self in forward",
    after=("shapes", "state", "initialisation"),
)
def keeps_nothing(subject: Subject) -> None:
    """Two texts read in turns give what each gives alone, and a copy goes on from a state as the
    original does.
    """
    texts = [tokens(1, 12, seed) for seed in (1, 2)]
    alone = [stream(subject.decoder(), ids, 4)[0] for ids in texts]
    decoder, states, found = subject.decoder(), [None, None], [[], []]  # type: ignore[var-annotated]
    for first in range(0, 12, 4):
        for i, ids in enumerate(texts):
            out, states[i] = decoder(ids[:, first : first + 4], states[i])
            found[i].append(out)
    for wanted, parts in zip(alone, found, strict=True):
        require(
            torch.equal(torch.cat(parts, 1), wanted),
            "reading two texts in turns changes what each of them gives",
        )
    fresh = subject.decoder()
    fresh.load_state_dict(copy.deepcopy(decoder.state_dict()))
    more = tokens(1, 4, 9)
    require(
        torch.equal(fresh(more, states[0])[0], decoder(more, states[0])[0]),
        "a fresh model goes on otherwise from the same state",
    )


@rule(
    "gradients",
    MODEL_KINDS,
    why="a parameter without gradient is never trained, and one that is not finite stops the run",
    mend="use every parameter in forward, and keep divisions and roots away from zero",
    after=("gradcheck", "state"),
)
def trained(subject: Subject) -> None:
    """Every parameter of the component gets a finite gradient that is not all zero."""
    decoder, ids = subject.decoder(), tokens(2, 8)
    _, state = decoder(ids[:, :4])
    states, _ = decoder(ids[:, 4:], tree_map(Tensor.detach, state))
    decoder.vocabulary.score(states, ids[:, 4:]).total.backward()
    for name, parameter in subject.owned(decoder):
        require(parameter.grad is not None, f"{name} gets no gradient")
        require(parameter.grad.isfinite().all(), f"the gradient of {name} is not finite")  # type: ignore[union-attr]
        require(parameter.grad.any(), f"the gradient of {name} is zero")  # type: ignore[union-attr]


@rule(
    "bfloat16",
    MODEL_KINDS,
    why="training computes in bfloat16, which has three significant digits",
    mend=(
        "take softmaxes, norms, angles and sums of many terms in float32, and add no large"
        " constants"
    ),
    after=("streaming", "low precision"),
)
def short_numbers(subject: Subject) -> None:
    """Autocast to bfloat16 changes states by no more than its rounding."""
    decoder, ids = subject.decoder(dtype=torch.float32), tokens(2, 12)
    subject.require_here(torch.bfloat16)
    wanted = stream(decoder, ids, 6)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = stream(decoder, ids, 6)[0].float()
    off = float(((found - wanted).norm() / wanted.norm()).detach())
    require(off < 0.05, f"states in bfloat16 are off by {off:.1%}; rounding alone makes 1 to 2 %")


@rule(
    "compile",
    MODEL_KINDS,
    why=(
        "torch.compile makes one graph of a block; where Python must look at a tensor's value, it"
        " breaks and the speed is lost"
    ),
    mend="no .item(), no branches on values, no printing in forward",
    after=("shapes", "state", "hidden state"),
)
def compiles(subject: Subject) -> None:
    """A warm step is one graph (traced without a compiler)."""
    decoder, ids = subject.decoder(dtype=torch.float32), tokens(2, 4)
    _, state = decoder(ids)
    kept = tree_map(Tensor.detach, state)
    torch._dynamo.reset()
    traced = torch.compile(decoder, fullgraph=True, backend="eager")
    wanted = decoder(ids, kept)[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, while it traces
            found = traced(ids, kept)[0]
    except Exception as error:
        raise Broken(" ".join(str(error).split())[:300]) from error
    finally:
        with suppress(Exception):
            torch._dynamo.reset()
    require(
        distance(found, wanted) < 1e-4,
        f"the graph gives other states, off by {distance(found, wanted):.2g}",
    )


@rule(
    "state dict",
    MODEL_KINDS,
    why=(
        "checkpoints hold parameters and persistent buffers; what else a forward pass needs must"
        " follow from the options"
    ),
    mend=(
        "make random tables persistent buffers or parameters, and let reset_parameters compute the"
        " others without drawing"
    ),
    after=("initialisation",),
)
def saved_and_loaded(subject: Subject) -> None:
    """A model of another seed that loads the state dict is the same model."""
    one, other = subject.decoder(seed=1), subject.decoder(seed=2)
    other.load_state_dict(one.state_dict())
    ids = tokens(2, 6)
    moved = distance(one(ids)[0], other(ids)[0])
    require(moved == 0, f"after loading its state dict a model differs by {moved:.2g}")


@rule(
    "state",
    ("memory",),
    why=(
        "memories are detached, stored, moved and dealt to processes by the core, which knows"
        " nothing of their meaning"
    ),
    mend=(
        "return None, a tensor, or nested dicts (text keys) and tuples of tensors, the batch row"
        " first, detached"
    ),
    after=("shapes",),
)
def state_is_plain(subject: Subject) -> None:
    """States are pytrees of detached, row-first tensors, one row's share is that row's own."""
    decoder, ids = subject.decoder(), tokens(3, 4)
    try:
        state = decoder(ids, decoder(ids)[1])[1]
        leaves = tree_leaves(state)
    except TypeError as error:
        raise Broken(str(error)) from error
    require(
        all(leaf.shape[:1] == (3,) for leaf in leaves),
        f"tensors of shapes {[list(t.shape) for t in leaves]} for 3 rows",
    )
    require(not any(leaf.requires_grad for leaf in leaves), "tensors of the state take a gradient")
    whole = decoder(ids)[1]
    for row in range(3):
        for own, all_rows in zip(
            tree_leaves(decoder(ids[row : row + 1])[1]), tree_leaves(whole), strict=True
        ):
            require(
                distance(own, all_rows[row : row + 1]) <= EXACT,
                f"row {row} alone keeps something else",
            )


@rule(
    "bias",
    ("positional",),
    why=(
        "keys come in parts (remembered ones, the new segment); a bias must know them by"
        " coordinate, and every form of it must agree"
    ),
    mend=(
        "compute bias(q, q_at, k_at) from coordinates; sinks are never biased; let dense() be what"
        " the structure says"
    ),
    after=("shapes",),
)
def bias_by_coordinates(subject: Subject) -> None:
    """The bias of some keys is that slice of the bias of all, in a shape that broadcasts to [B, H,
    T, N].
    """
    encoding = subject.layer()
    q = torch.randn(
        2,
        3,
        DIMS.n_heads,
        DIMS.d_head,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    q_positions, k_positions = torch.arange(3), torch.arange(-5, 3)
    bias = encoding.bias(q, q_positions, k_positions)  # type: ignore[operator]
    require(
        (bias is not None) == bool(encoding.has_bias),
        f"biased is {encoding.has_bias}, but bias() returns {bias!r}",
    )
    if bias is None:
        return
    dense = bias.dense()
    full = torch.broadcast_to(dense, (2, DIMS.n_heads, 3, 8))
    for first, last in ((0, 5), (5, 8)):
        part = encoding.bias(q, q_positions, k_positions[first:last]).dense()  # type: ignore[operator]
        part = torch.broadcast_to(part, (2, DIMS.n_heads, 3, last - first))
        moved = distance(part, full[..., first:last])
        require(
            moved <= EXACT, f"keys {first} to {last - 1} alone are biased otherwise, by {moved:.2g}"
        )
    if isinstance(bias, SlopeBias):
        formula = SlopeBias.dense(bias)
        require(distance(dense, formula) <= EXACT, "dense() is not what its slopes say")
