"""Checks of heads: what they score is what they say."""

from __future__ import annotations

import torch
from torch import Tensor

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, Subject
from lswt_core.conformance.tensors import (
    EXACT,
    VOCAB_SIZE,
    max_difference,
    random_normal,
    random_tokens,
)
from lswt_core.interfaces import IGNORE, Head, LabelSampling
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy

ROWS, LENGTH = 3, 5


def build_head(subject: Subject) -> Head:
    """The head alone, in float64."""
    head = subject.module()
    assert isinstance(head, Head)
    return head


@rule(
    "logits",
    ("head",),
    why="a token is predicted from its own hidden state, and generation asks for a few tokens only",
    fix=(
        "compute logits [B, T, V] of every token from its own state, and embed ids by"
        " project_in(table(ids))"
    ),
    after=("meta device",),
)
def logits_are_of_every_token(subject: Subject) -> None:
    """Logits have the vocabulary's size, and each token's depend on its own state."""
    head, states = build_head(subject), random_normal(ROWS, LENGTH, DIMS.d_model)
    logits = head.logits(states)
    wanted = (ROWS, LENGTH, VOCAB_SIZE)
    require(logits.shape == wanted, f"logits are {list(logits.shape)}, not {list(wanted)}")
    error = max_difference(head.logits(states[1:2, 2:3]), logits[1:2, 2:3])
    require(error <= EXACT, f"logits of a token depend on other tokens, by {error:.2g}")
    ids = random_tokens(ROWS, LENGTH)
    error = max_difference(head.embed(ids), head.project_in(head.table(ids)))
    require(error <= EXACT, f"embed is not project_in of the table's rows, by {error:.2g}")


@rule(
    "scores",
    ("head",),
    why="a model is trained by score and generates by logits: they must be one distribution",
    fix=(
        "let score hand z and table to the cross-entropy such that z @ table.T, capped by soft_cap,"
        " are the logits"
    ),
    after=("logits",),
)
def scores_are_of_the_logits(subject: Subject) -> None:
    """Loss, sampled labels and logsumexp of ``score``, and their gradients by the states, are those
    of ``logits``.
    """
    head = build_head(subject)
    states = random_normal(ROWS, LENGTH, DIMS.d_model).requires_grad_()
    labels = random_tokens(ROWS, LENGTH, 1)
    labels[0, 1:3] = IGNORE
    uniforms = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(4))
    draws = LabelSampling(uniforms)
    unit = torch.eye(VOCAB_SIZE, dtype=states.dtype)
    expected = dense_cross_entropy(head.logits(states), unit, labels, draws, logsumexp=True)
    for by in (dense_cross_entropy, None):
        out = head.score(states, labels, draws, by=by, logsumexp=True)
        for field in ("total", "sampled", "logsumexp"):
            pair = [getattr(one, field) for one in (out, expected)]
            require(pair[0] is not None, f"score leaves out {field}")
            error = max_difference(*pair)
            require(error <= EXACT, f"{field} of score is not that of the logits, by {error:.2g}")
            error = max_difference(*(gradient(value, states) for value in pair))
            require(error <= EXACT, f"the gradient of {field} is off by {error:.2g}")


def gradient(value: Tensor, states: Tensor) -> Tensor:
    """The gradient of a sum of squares by the states."""
    return torch.autograd.grad(value.square().sum(), states, retain_graph=True)[0]


@rule(
    "frozen embedding",
    ("head",),
    why="embedding.trainable = false promises a table that is never trained",
    fix="call requires_grad_(False) on the table in freeze()",
    after=("logits",),
)
def freezing_keeps_the_table(subject: Subject) -> None:
    """After ``freeze`` the table takes no gradient."""
    head = build_head(subject)
    head.freeze()
    trained = [name for name, p in head.table.named_parameters() if p.requires_grad]
    require(not trained, f"still trained after freeze: table.{', table.'.join(trained)}")
