"""Checks of parametrisations: their factors, and the size of activations against the width."""

from __future__ import annotations

from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.conformance.check import Violation, require, rule
from lswt_core.conformance.subject import DIMS, Subject
from lswt_core.conformance.tensors import random_tokens
from lswt_core.errors import Incompatible, PluginError
from lswt_core.interfaces import Dims, ParameterInfo, Parametrisation, Scaling
from lswt_core.model.activation_growth import (
    LOGITS,
    Growth,
    Measurement,
    activation_sizes,
    fit_growth,
)
from lswt_core.model.decoder import Decoder
from lswt_core.model.initialise import initialise
from lswt_core.model.parametrise import compute_scalings, parameter_roles, scale_initial_values

WIDTHS = (32, 64, 128, 256)
LEARNING_RATE = 0.01  # of the base model; high, so that widths differ after two updates
UPDATES = 2


def dims_of_width(width: int) -> Dims:
    """The sizes of a model of a width that a base model can have, too."""
    return DIMS._replace(d_model=width, n_heads=width // 8, d_ffn=2 * width)


def scalings_of(
    subject: Subject, parametrisation: Parametrisation, dims: Dims
) -> dict[str, Scaling]:
    """The factors of a reference model's parameters that have one other than 1, by name. Raises
    SkipTest if there is no base model for these sizes.
    """
    try:
        return compute_scalings(parametrisation, dims, subject.meta_decoder)
    except Incompatible as error:
        raise SkipTest(str(error)) from error
    except PluginError as error:
        raise Violation(str(error)) from error


@rule(
    "factors",
    ("parametrisation",),
    why="a factor of 0, or one that is not finite, switches a parameter off or destroys it",
    fix="return positive, finite factors that follow from role and shapes alone",
    after=("interface",),
)
def factors_are_positive_and_repeatable(subject: Subject) -> None:
    """Factors are positive and finite at several widths, and come again the same."""
    parametrisation: Parametrisation = subject.build()
    for width in WIDTHS:
        dims = dims_of_width(width)
        first = scalings_of(subject, parametrisation, dims)
        again = scalings_of(subject, parametrisation, dims)
        other = scalings_of(subject, subject.build(), dims)
        require(first == again == other, f"factors at width {width} differ from call to call")


@rule(
    "base model",
    ("parametrisation",),
    why="options are tuned on the base model, where they must mean what they say",
    fix="derive every factor from shape over base_shape, so that it is 1 where they are equal",
    after=("factors",),
)
def base_model_is_unscaled(subject: Subject) -> None:
    """Every factor is 1 in a model that is its own base."""
    parametrisation: Parametrisation = subject.build()
    for width in WIDTHS:
        model = subject.meta_decoder(dims_of_width(width))
        for name, (role, shape) in parameter_roles(model):
            info = ParameterInfo(name, role, shape, shape)  # type: ignore[arg-type]
            scaling = parametrisation.scaling(info)
            require(
                scaling == Scaling(),
                f"{name} {list(shape)} has the factors {tuple(scaling)} where it is its own base",
            )


@rule(
    "coordinate check",
    ("parametrisation",),
    why=(
        "activations that grow with the width change the best learning rate, which a"
        " parametrisation is there to keep"
    ),
    fix=(
        "for Adam-like updates: a matrix whose fan-in is m times the base model's starts at 1 /"
        " sqrt(m) (at 1 / m if its fan-out does not grow) and learns at 1 / m (Yang et al. 2022)"
    ),
    after=("base model",),
)
def activations_do_not_grow(subject: Subject) -> None:
    """After two updates of AdamW, no activation of a parametrisation that scales matrices grows
    with the width.
    """
    parametrisation: Parametrisation = subject.build()
    measured: list[Measurement] = []
    scaled = False
    for width in WIDTHS:
        dims = dims_of_width(width)
        scalings = scalings_of(subject, parametrisation, dims)
        scaled = scaled or any(scaling.lr != 1 for scaling in scalings.values())
        base = parametrisation.base_dims(dims)
        decoder = build_decoder(subject, dims, scalings, base.d_model**-0.5)
        measured += measure_updates(decoder, scalings, width)
    if not scaled:
        raise SkipTest("it scales no learning rate")
    growing = [one for one in fit_growth(measured) if not one.is_stable]
    require(not growing, describe(growing))


def describe(growing: list[Growth]) -> str:
    """The activation that grows most, in words."""
    if not growing:
        return ""
    worst = max(growing, key=lambda one: one.exponent)
    what = "the logits grow" if worst.place == LOGITS else f"hidden states at {worst.place!r} grow"
    return f"after {worst.step} updates {what} as width ^ {worst.exponent:.2f}"


def build_decoder(
    subject: Subject, dims: Dims, scalings: dict[str, Scaling], std: float
) -> Decoder:
    """A reference model with the parametrisation's initial values."""
    decoder = subject.meta_decoder(dims).to_empty(device="cpu")
    initialise(decoder, seed=0, std=std)
    scale_initial_values(decoder.named_parameters(), scalings)
    return decoder


def measure_updates(
    decoder: Decoder, scalings: dict[str, Scaling], width: int
) -> list[Measurement]:
    """The sizes of activations before and after updates of AdamW."""
    groups: list[dict[str, Any]] = [
        {"params": [p], "lr": LEARNING_RATE * scalings.get(name, Scaling()).lr}
        for name, p in decoder.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    probe = random_tokens(4, 16)
    measured = [Measurement(width, 0, *one) for one in activation_sizes(decoder, probe)]
    for step in range(1, UPDATES + 1):
        optimizer.zero_grad()
        loss_of(decoder, random_tokens(4, 17, step)).backward()
        optimizer.step()
        measured += [Measurement(width, step, *one) for one in activation_sizes(decoder, probe)]
    return measured


def loss_of(decoder: Decoder, ids: Tensor) -> Tensor:
    """The mean cross-entropy of the next tokens."""
    states, _ = decoder(ids[:, :-1])
    return decoder.vocabulary.score(states, ids[:, 1:]).total / ids[:, 1:].numel()
