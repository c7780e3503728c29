"""A check of the gradients of what layers hand to the layers above."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import SkipTest

import torch
from torch import Tensor, nn

from lswt_core.conformance.check import Violation, rule
from lswt_core.conformance.subject import LAYER_KINDS, Subject
from lswt_core.conformance.tensors import random_normal, random_tokens, tensors_in
from lswt_core.conformance.training_checks import error_at_most_points
from lswt_core.interfaces import Layer, LayerContext, LayerOutput
from lswt_core.model.decoder import Decoder

STEP = 1e-6  # of finite differences
OUTPUT = ""  # the layer's input and output x, among entries of the carry by name
Values = Mapping[str, list[Tensor]]


class Call(NamedTuple):
    """A call of a layer in a forward pass."""

    layer: Layer
    args: tuple[Any, ...]  # x [B, T, ...] first
    kwargs: Mapping[str, Any]
    context: LayerContext


@rule(
    "carry gradients",
    LAYER_KINDS,
    why=(
        "a layer below is trained by all that the layers above make of its values; where these are"
        " detached on the way, it is trained by a part of the loss, without a word"
    ),
    fix=(
        "detach nothing that is read out of context.carry or returned in LayerOutput.carry (states"
        " alone are detached, by the core)"
    ),
    after=("carry", "forward", "stateless"),
)
def carry_has_gradients(subject: Subject) -> None:
    """Derivatives of outputs by what a layer reads, and of what it writes by its inputs, agree with
    finite differences in float64, at two of three points.
    """
    if error := error_at_most_points(lambda seed: check_point(subject, seed)):
        raise Violation(str(error)) from error


def check_point(subject: Subject, seed: int) -> None:
    """Compare derivatives at one point. Raises RuntimeError where they disagree, SkipTest if no
    layer reads or writes numbers.
    """
    compared = 0
    for call in calls_with_carry(subject, subject.decoder(seed=seed), seed):
        inputs = inputs_of(call)
        for name in sorted(call.layer.writes):
            compared += compare(call, inputs, list(inputs), [name], f"writes {name!r}")
        for name in sorted(call.layer.reads & inputs.keys()):
            outputs = [OUTPUT, *sorted(call.layer.writes)]
            compared += compare(call, inputs, [name], outputs, f"reads {name!r}")
    if not compared:
        raise SkipTest("it neither reads nor writes numbers")


def calls_with_carry(subject: Subject, decoder: Decoder, seed: int) -> list[Call]:
    """The calls of the component's layers that read or write, in one forward pass."""
    calls: list[Call] = []

    def keep(layer: nn.Module, args: Any, kwargs: Any) -> None:
        assert isinstance(layer, Layer)
        given = [*args, *kwargs.values()]
        context = next((one for one in given if isinstance(one, LayerContext)), None)
        if context is not None:
            calls.append(Call(layer, args, kwargs, context))

    for layer in subject.own_modules(decoder):
        if isinstance(layer, Layer) and layer.reads | layer.writes:
            layer.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        decoder(random_tokens(1, 5, seed))
    for layer in subject.own_modules(decoder):
        layer._forward_pre_hooks.clear()
    return calls


def inputs_of(call: Call) -> Values:
    """The numbers that a layer is given: x, and those of every entry that it reads, by name."""
    entries = {name: floats_in(call.context.carry.get(name)) for name in call.layer.reads}
    return {OUTPUT: [call.args[0]]} | {name: found for name, found in entries.items() if found}


def floats_in(value: Any) -> list[Tensor]:
    """Every tensor of numbers that may have a gradient."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def compare(call: Call, inputs: Values, moved: list[str], observed: list[str], what: str) -> bool:
    """Compare the derivative of some outputs by some inputs, in a random direction, with finite
    differences; returns whether there are such outputs. Raises RuntimeError where they disagree.
    """
    directions = {
        name: [random_normal(*t.shape, seed=i) for i, t in enumerate(inputs[name])]
        for name in moved
    }
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = observe(call, shifted(inputs, directions, step), observed)
    if value is None:
        return False
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, step, allow_unused=True)
    found = 0.0 if gradient is None else float(gradient)
    with torch.no_grad():
        sides = [observe(call, shifted(inputs, directions, h), observed) for h in (STEP, -STEP)]
    expected = float(sides[0] - sides[1]) / (2 * STEP)  # type: ignore[operator]
    if abs(found - expected) > 1e-4 * (abs(found) + abs(expected)) + 1e-6:
        raise RuntimeError(
            f"{call.layer.name!r} {what} without its gradient: a derivative is {found:.4g}, finite"
            f" differences give {expected:.4g}"
        )
    return True


def shifted(inputs: Values, directions: Values, step: Tensor | float) -> Values:
    """Inputs moved by a step in some directions."""
    moved = {
        name: [x + step * direction for x, direction in zip(inputs[name], along, strict=True)]
        for name, along in directions.items()
    }
    return {**inputs, **moved}


def observe(call: Call, values: Values, observed: list[str]) -> Tensor | None:
    """A weighted sum of some outputs of a layer; None if they have no numbers."""
    outputs = run(call, values)
    found = [t for name in observed for t in floats_in(outputs[name])]
    terms = [(random_normal(*t.shape, seed=9) * t).sum() for t in found]
    return torch.stack(terms).sum() if terms else None


def run(call: Call, values: Values) -> dict[str, Any]:
    """Call a layer again with other numbers: its output and what it writes, by name."""
    carry = dict(call.context.carry)
    for name, tensors in values.items():
        if name != OUTPUT:
            carry[name] = with_floats(carry[name], iter(tensors))
    context = call.context._replace(carry=carry)

    def replace(value: Any) -> Any:
        return context if isinstance(value, LayerContext) else value

    args = (values[OUTPUT][0], *map(replace, call.args[1:]))
    out = call.layer(*args, **{key: replace(value) for key, value in call.kwargs.items()})
    assert isinstance(out, LayerOutput)
    return {OUTPUT: out.x, **out.carry}


def with_floats(value: Any, tensors: Iterator[Tensor]) -> Any:
    """A value with its tensors of numbers, in order, replaced."""
    if isinstance(value, Tensor):
        return next(tensors) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: with_floats(branch, tensors) for key, branch in value.items()}
    if not isinstance(value, list | tuple):
        return value
    branches = [with_floats(branch, tensors) for branch in value]
    return type(value)(*branches) if hasattr(value, "_fields") else type(value)(branches)
