"""Checks of the model's components that concern training: derivatives, autocast, torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from lswt_core.conformance.check import Violation, require, rule
from lswt_core.conformance.subject import GRADCHECK_DIMS, MODEL_KINDS, Subject
from lswt_core.conformance.tensors import (
    decode_segments,
    max_difference,
    random_normal,
    random_tokens,
)
from lswt_core.interfaces import LossSum
from lswt_core.model.decoder import Decoder
from lswt_core.plugin_api.pytree import tree_map

MAX_BATCHES = 24
IDS_OF_TRUNK = random_tokens(1, 3)  # for layers that read token ids


class Trunk(nn.Module):
    """A decoder from its embedded inputs to its hidden states."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, M] -> [B, T, M]."""
        return self.decoder.trunk(x, ids=IDS_OF_TRUNK)[0]


@rule(
    "gradcheck",
    MODEL_KINDS,
    why="a wrong derivative minimises another loss than the one that is reported",
    fix="check custom backward functions, and keep float64 float64: no cast to float32 on the way",
    after=("causality", "reference"),
)
def derivatives_are_right(subject: Subject) -> None:
    """Derivatives by inputs and by the component's parameters agree with finite differences in
    float64, at two of three points: finite differences are wrong near a kink (ReLU, a router).
    """
    if error := error_at_most_points(lambda seed: check_derivatives(subject, seed)):
        raise Violation(shorten(error)) from error


def error_at_most_points(check: Callable[[int], None]) -> RuntimeError | None:
    """An error that a check raises at two of three points (seeds)."""
    failures: list[RuntimeError] = []
    for point in range(3):
        try:
            check(point)
        except RuntimeError as error:
            failures.append(error)
        if len(failures) == 2:
            return failures[0]
        if point - len(failures) == 1:  # two have passed
            return None
    return None


def check_derivatives(subject: Subject, seed: int) -> None:
    """Compare derivatives at one point. Raises RuntimeError where they disagree."""
    decoder = subject.decoder(GRADCHECK_DIMS, seed=seed)
    trunk = Trunk(decoder)
    names = [name for name, _ in subject.own_parameters(decoder)]
    parameters = dict(decoder.named_parameters())
    values = [parameters[name].detach().requires_grad_() for name in names]
    for name in names:
        parameters[name].requires_grad_(False)
    x = (random_normal(1, 3, GRADCHECK_DIMS.d_model, seed=seed) * 0.7).requires_grad_()

    def apply_trunk(x: Tensor, *values: Tensor) -> Tensor:
        replaced = {f"decoder.{name}": value for name, value in zip(names, values, strict=True)}
        out: Tensor = torch.func.functional_call(trunk, replaced, x)
        return out

    torch.autograd.gradcheck(apply_trunk, (x, *values), fast_mode=True, check_batched_grad=False)


def shorten(error: Exception) -> str:
    """The first 300 characters of an error's message, on one line."""
    return " ".join(str(error).split())[:300]


@rule(
    "gradients",
    MODEL_KINDS,
    why=(
        "a parameter without a gradient is never trained, and a gradient that is not finite stops"
        " the run"
    ),
    fix="use every parameter in forward, and keep divisions and roots away from zero",
    after=("gradcheck", "state", "loss gradient"),
)
def parameters_get_gradients(subject: Subject) -> None:
    """Every parameter of the component gets a finite gradient that is not all zero, from one of
    several batches, near the initial values: an expert may get no token of the first. Where tokens
    are grouped, the others have several groups: what one group writes may be used in the next.
    """
    decoder = subject.decoder()
    own = subject.own_parameters(decoder)
    unmoved: dict[str, str] = {name: "gets no gradient" for name, _ in own}
    grouped = max(layer.position_dependent_from or 0 for layer in decoder.layers())
    for seed in range(MAX_BATCHES):
        differentiate(decoder, random_tokens(4, max(16, 4 * grouped) if seed else 16, seed))
        for name, parameter in own:
            if (gradient := parameter.grad) is not None:
                require(gradient.isfinite().all(), f"the gradient of {name} is not finite")
                unmoved[name] = "" if gradient.any() else "has a gradient of zero"
        if not any(unmoved.values()):
            return
        disturb([parameter for _, parameter in own], seed)
    found = [f"{name} {what}" for name, what in unmoved.items() if what]
    raise Violation(", ".join(found))


@torch.no_grad()
def disturb(parameters: list[nn.Parameter], seed: int) -> None:
    """Move parameters a little: a factor of something that starts at zero has no gradient there."""
    for number, parameter in enumerate(parameters):
        noise = random_normal(*parameter.shape, seed=1000 * seed + number)
        parameter.add_(noise, alpha=0.1)


def differentiate(decoder: Decoder, ids: Tensor) -> None:
    """Add the gradients of cross-entropy and of layers' losses over the second half of ids."""
    half = ids.shape[1] // 2
    _, state = decoder(ids[:, :half])
    losses: dict[str, LossSum] = {}
    states, _ = decoder(ids[:, half:], tree_map(Tensor.detach, state), losses=losses)
    total = decoder.vocabulary.score(states, ids[:, half:]).total
    torch.stack([total, *(term.total for term in losses.values())]).sum().backward()


@rule(
    "bfloat16",
    MODEL_KINDS,
    why="training computes in bfloat16, which has three significant decimal digits",
    fix=(
        "compute softmax, norms, angles and sums of many terms in float32, and add no large"
        " constants"
    ),
    after=("segment invariance", "low precision"),
)
def autocast_only_rounds(subject: Subject) -> None:
    """Autocast to bfloat16 changes hidden states by no more than rounding does."""
    decoder, ids = subject.decoder(dtype=torch.float32), random_tokens(2, 12)
    subject.require_cpu(torch.bfloat16)
    expected, _ = decode_segments(decoder, ids, 6)
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = decode_segments(decoder, ids, 6)
    error = float(((states.float() - expected).norm() / expected.norm()).detach())
    require(
        error < 0.05, f"hidden states in bfloat16 are off by {error:.1%}; rounding makes 1 to 2 %"
    )


@rule(
    "compile",
    MODEL_KINDS,
    why=(
        "torch.compile turns a block into one graph; a graph break, where Python needs a tensor's"
        " value, costs the speed"
    ),
    fix=(
        "no .item(), no branches and shapes that depend on values (nonzero, x[mask]), no printing"
        " in forward; the shapes of where, sort and cumsum are fixed"
    ),
    after=("shapes", "state", "stateless"),
)
def compiles_without_graph_breaks(subject: Subject) -> None:
    """A step with a memory state is traced as one graph (backend "eager": no code is generated)."""
    decoder, ids = subject.decoder(dtype=torch.float32), random_tokens(2, 4)
    _, state = decoder(ids)
    state = tree_map(Tensor.detach, state)
    expected = decoder(ids, state)[0]
    torch._dynamo.reset()
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own tracing
            states = compiled(ids, state)[0]
    except Exception as error:
        raise Violation(shorten(error)) from error
    finally:
        with suppress(Exception):
            torch._dynamo.reset()
    difference = max_difference(states, expected)
    require(difference < 1e-4, f"the graph gives other hidden states, off by {difference:.2g}")
