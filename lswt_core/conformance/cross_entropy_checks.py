"""Checks of cross-entropy implementations against the formula."""

from __future__ import annotations

from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.conformance.check import Violation, require, rule
from lswt_core.conformance.subject import Subject
from lswt_core.conformance.tensors import VOCAB_SIZE, random_normal
from lswt_core.interfaces import (
    IGNORE,
    CrossEntropy,
    CrossEntropyOutput,
    LabelSampling,
    Unsupported,
)
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy

ROWS, LENGTH, WIDTH = 3, 7, 16
TOLERANCE = 1e-5  # relative to the largest number: kernels may compute in float32


def build_cross_entropy(subject: Subject) -> CrossEntropy:
    """The component; raises SkipTest if it does not run on the CPU."""
    cross_entropy: CrossEntropy = subject.build()
    try:
        cross_entropy.require("cpu")
    except Unsupported as reason:
        raise SkipTest(f"it cannot run here: {reason}") from reason
    return cross_entropy


def make_inputs(*, trained: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """States z [B, T, d_vocab], an embedding table [V, d_vocab], in float16 if it is not trained,
    and labels [B, T], some of them IGNORE.
    """
    z = random_normal(ROWS, LENGTH, WIDTH, dtype=torch.float32).requires_grad_()
    table = random_normal(VOCAB_SIZE, WIDTH, seed=1, dtype=torch.float32)
    labels = torch.randint(VOCAB_SIZE, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    ignored = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.3
    labels = labels.masked_fill(ignored, IGNORE)
    if trained:
        return z, table.requires_grad_(), labels
    return z, table.half(), labels


def require_close(value: Tensor | None, expected: Tensor, name: str) -> None:
    """Raise Violation unless a tensor has the expected shape and numbers."""
    if value is None or value.shape != expected.shape:
        raise Violation(f"{name} is missing, or its shape is not {list(expected.shape)}")
    error = float((value.detach() - expected.detach()).abs().max().nan_to_num(torch.inf))
    scale = max(1.0, float(expected.detach().abs().max()))
    require(error <= TOLERANCE * scale, f"{name} is off by {error:.2g}")


def require_same_field(
    out: CrossEntropyOutput, expected: CrossEntropyOutput, field: str, inputs: list[Tensor]
) -> None:
    """Raise Violation unless a field of two outputs has the same values and the same gradients."""
    value, expected_value = getattr(out, field), getattr(expected, field)
    require_close(value, expected_value, field)
    gradients = torch.autograd.grad(0.37 * value.square().sum(), inputs)
    expected_gradients = torch.autograd.grad(0.37 * expected_value.square().sum(), inputs)
    for own, right in zip(gradients, expected_gradients, strict=True):
        require_close(own, right, f"the gradient of {field}")


@rule(
    "reference",
    ("cross_entropy",),
    why="losses of different recipes are compared, so they must not depend on the implementation",
    fix=(
        "compute the sum of -log softmax(z @ table.T)[label] over labels that are not IGNORE,"
        " softmax and sum in float32 at least"
    ),
    after=("interface",),
)
def matches_the_formula(subject: Subject) -> None:
    """Total and number of correct labels are the formula's, with and without gradients, and 0 if
    nothing is predicted.
    """
    cross_entropy = build_cross_entropy(subject)
    z, table, labels = make_inputs()
    for some_labels in (labels, torch.full_like(labels, IGNORE)):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                out = cross_entropy(z, table, some_labels)
                expected = dense_cross_entropy(z, table, some_labels)
            require(
                isinstance(out, CrossEntropyOutput),
                f"forward returns {type(out).__name__}, not CrossEntropyOutput",
            )
            require_close(out.total, expected.total, "the total")
            correct, right = int(out.correct), int(expected.correct)
            require(correct == right, f"{correct} labels are counted as correct, not {right}")


@rule(
    "cross-entropy gradients",
    ("cross_entropy",),
    why="a wrong derivative minimises another loss than the one that is reported",
    fix=(
        "differentiate the total by z and, if it is trained, by the table; a frozen table is"
        " float16 and takes no gradient"
    ),
    after=("reference",),
)
def gradients_match(subject: Subject) -> None:
    """Gradients are the formula's, for a trained table and for a frozen one."""
    for trained in (True, False):
        cross_entropy = build_cross_entropy(subject)
        z, table, labels = make_inputs(trained=trained)
        require_same_field(
            cross_entropy(z, table, labels),
            dense_cross_entropy(z, table, labels),
            "total",
            [z, table] if trained else [z],
        )


@rule(
    "sampled labels",
    ("cross_entropy",),
    why=(
        "Sophia-G estimates the curvature from labels sampled from the model; every implementation"
        " must sample the same ones"
    ),
    fix=(
        "take the first id at which the cumulative softmax exceeds the token's uniform number"
        " (lswt_core.plugin_api.cross_entropy.draw), for predicted tokens of draws.rows alone"
    ),
    after=("reference", "cross-entropy gradients"),
)
def samples_labels(subject: Subject) -> None:
    """Loss and gradients for sampled labels are the formula's, for all rows and for some, and the
    total of the data's labels stays as it was.
    """
    uniforms = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(4))
    for rows in (None, torch.tensor([True, False, True])):
        cross_entropy, draws = build_cross_entropy(subject), LabelSampling(uniforms, rows)
        z, table, labels = make_inputs()
        for field in ("sampled", "total"):
            require_same_field(
                cross_entropy(z, table, labels, draws),
                dense_cross_entropy(z, table, labels, draws),
                field,
                [z, table],
            )


@rule(
    "logsumexp",
    ("cross_entropy",),
    why="losses such as the z-loss are computed from the logsumexp of every token's logits",
    fix=(
        "with logsumexp=True return log(sum(exp(logits))) of every token, 0 where nothing is"
        " predicted"
    ),
    after=("reference", "cross-entropy gradients"),
)
def logsumexp_matches(subject: Subject) -> None:
    """The logsumexp of every token and its gradient are the formula's."""
    cross_entropy = build_cross_entropy(subject)
    z, table, labels = make_inputs()
    require_same_field(
        cross_entropy(z, table, labels, logsumexp=True),
        dense_cross_entropy(z, table, labels, logsumexp=True),
        "logsumexp",
        [z, table],
    )


@rule(
    "soft cap",
    ("cross_entropy",),
    why="a head that caps its logits is trained, sampled and exported by the capped ones",
    fix=(
        "with soft_cap take cap * tanh(z @ table.T / cap) for the logits everywhere: loss, sampled"
        " labels, logsumexp and their gradients (times 1 - tanh^2); or leave takes_soft_cap False"
    ),
    after=("reference", "cross-entropy gradients", "sampled labels", "logsumexp"),
)
def caps_logits(subject: Subject) -> None:
    """Loss, sampled labels and logsumexp of capped logits are the formula's."""
    cross_entropy = build_cross_entropy(subject)
    if not cross_entropy.takes_soft_cap:
        raise SkipTest("it takes no soft_cap")
    uniforms = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(4))
    draws = LabelSampling(uniforms)
    z, table, labels = make_inputs()
    for field in ("total", "sampled", "logsumexp"):
        require_same_field(
            cross_entropy(z, table, labels, draws, logsumexp=True, soft_cap=2.0),
            dense_cross_entropy(z, table, labels, draws, logsumexp=True, soft_cap=2.0),
            field,
            [z, table],
        )
