"""Checks of cross-entropies: whatever the kernels, they find what the formula finds."""

from __future__ import annotations

from unittest import SkipTest

import torch
from torch import Tensor

from lswt_core.conformance.attention_checks import numbers
from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import VOCAB, Subject
from lswt_core.interfaces import (
    IGNORE,
    CrossEntropy,
    CrossEntropyOutput,
    LabelSampling,
    Unsupported,
)
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy

ROWS, LENGTH, WIDTH = 3, 7, 16
CLOSE = 1e-5  # of the largest number: kernels may compute in float32


def scoring_of(subject: Subject) -> CrossEntropy:
    """The component; skips where it says that it cannot run on the CPU."""
    scoring: CrossEntropy = subject.make()
    try:
        scoring.require("cpu")
    except Unsupported as reason:
        raise SkipTest(f"it cannot run here: {reason}") from reason
    return scoring


def question(*, trained: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Z [B, T, d_vocab], a table [V, d_vocab], in half precision where it is not trained, and
    labels [B, T], some of them ignored.
    """
    table = numbers(VOCAB, WIDTH, seed=1, dtype=torch.float32)
    labels = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    ignored = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.3
    z = numbers(ROWS, LENGTH, WIDTH, dtype=torch.float32).requires_grad_()
    return (
        z,
        table.requires_grad_() if trained else table.half(),
        labels.masked_fill(ignored, IGNORE),
    )


def near(found: Tensor | None, wanted: Tensor | None, told: str) -> None:
    """Raise Broken, saying what is off, unless numbers agree."""
    assert wanted is not None
    require(
        found is not None and found.shape == wanted.shape,
        f"{told} is not told, or of another shape than {list(wanted.shape)}",
    )
    assert found is not None
    off = float((found.detach() - wanted.detach()).abs().max().nan_to_num(torch.inf))
    require(
        off <= CLOSE * max(1.0, float(wanted.detach().abs().max())), f"{told} is off by {off:.2g}"
    )


def like(
    found: CrossEntropyOutput, wanted: CrossEntropyOutput, of: str, given: list[Tensor]
) -> None:
    """Raise Broken unless a field of two scores is the same, and has the same gradients."""
    value, right_value = getattr(found, of), getattr(wanted, of)
    near(value, right_value, of)
    slopes = (torch.autograd.grad(0.37 * one.square().sum(), given) for one in (value, right_value))
    for own, right in zip(*slopes, strict=True):
        near(own, right, f"the gradient of {of}")


@rule(
    "formula",
    ("cross_entropy",),
    why="losses of different recipes are compared, so the way they are computed must not show",
    mend=(
        "sum -log softmax(z @ table.T)[label] over the labels that are not IGNORE, softmax and sum"
        " in float32 at least"
    ),
)
def formula(subject: Subject) -> None:
    """Total and correct labels are the formula's, with and without gradients, and nothing where
    nothing is predicted.
    """
    scoring, (z, table, labels) = scoring_of(subject), question()
    for given in (labels, torch.full_like(labels, IGNORE)):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                found, right = scoring(z, table, given), dense_cross_entropy(z, table, given)
            require(
                isinstance(found, CrossEntropyOutput),
                f"forward returns {type(found).__name__}, not a Score",
            )
            near(found.total, right.total, "the total")
            told = f"{int(found.correct)} labels are said to be right, not {int(right.correct)}"
            require(int(found.correct) == int(right.correct), told)


@rule(
    "gradients of labels",
    ("cross_entropy",),
    why="a wrong derivative trains something else than what is reported",
    mend=(
        "differentiate the total towards z and, where it learns, the table; a frozen one is float16"
        " and takes no gradient"
    ),
    after=("formula",),
)
def derivatives(subject: Subject) -> None:
    """Gradients are the formula's, for a table that learns and for a frozen one."""
    for trained in (True, False):
        scoring, (z, table, labels) = scoring_of(subject), question(trained=trained)
        like(
            scoring(z, table, labels),
            dense_cross_entropy(z, table, labels),
            "total",
            [z, table] if trained else [z],
        )


@rule(
    "drawn labels",
    ("cross_entropy",),
    why=(
        "Sophia-G's curvature is the gradient towards labels that the model draws itself; every"
        " recipe must draw the same"
    ),
    mend=(
        "take the first id at which the cumulative softmax exceeds the token's number"
        " (lswt_core.plugin_api.token_scores.sample_labels), where a label is predicted and for draws.rows"
        " alone"
    ),
    after=("formula", "gradients of labels"),
)
def draws_labels(subject: Subject) -> None:
    """What is sampled is the formula's, for all rows and for some, and leaves the total as it was."""
    uniforms = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(4))
    for rows in (None, torch.tensor([True, False, True])):
        scoring, (z, table, labels), draws = (
            scoring_of(subject),
            question(),
            LabelSampling(uniforms, rows),
        )
        like(
            scoring(z, table, labels, draws),
            dense_cross_entropy(z, table, labels, draws),
            "sampled",
            [z, table],
        )
        like(
            scoring(z, table, labels, draws),
            dense_cross_entropy(z, table, labels, draws),
            "total",
            [z, table],
        )


@rule(
    "logsumexp",
    ("cross_entropy",),
    why="losses such as the z-loss are computed from every token's logsumexp",
    mend=(
        "return log sum exp(logits) of every token, 0 where nothing is predicted, where"
        " logsumexp=True is asked for"
    ),
    after=("formula", "gradients of labels"),
)
def normalises(subject: Subject) -> None:
    """Every token's logsumexp is the formula's, and so is its gradient."""
    scoring, (z, table, labels) = scoring_of(subject), question()
    like(
        scoring(z, table, labels, logsumexp=True),
        dense_cross_entropy(z, table, labels, logsumexp=True),
        "logsumexp",
        [z, table],
    )
