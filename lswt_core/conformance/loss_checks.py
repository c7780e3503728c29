"""Checks of auxiliary losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lswt_core.conformance.check import require, rule
from lswt_core.conformance.subject import DIMS, Subject
from lswt_core.conformance.tensors import (
    VOCAB_SIZE,
    describe_sums,
    random_normal,
    random_tokens,
)
from lswt_core.conformance.training_checks import error_at_most_points
from lswt_core.interfaces import IGNORE, Batch, CrossEntropyOutput, LossSum, Output
from lswt_core.plugin_api.cross_entropy import dense_cross_entropy


def make_batch(
    subject: Subject, rows: int = 4, length: int = 6, *, padded: bool = True, ahead: bool = True
) -> Batch:
    """Random tokens and labels; padding, which is not predicted, where ``valid`` is False. Labels
    after the segment, some of them IGNORE, if the loss reads them and ``ahead``.
    """
    inputs, labels = random_tokens(rows, length), random_tokens(rows, length, 1)
    lookahead = getattr(subject.module(), "lookahead", 0)
    labels_ahead = None
    if lookahead and ahead:
        labels_ahead = random_tokens(rows, lookahead, 2)
        labels_ahead[0] = IGNORE
    if not padded:
        return Batch(inputs, labels, labels_ahead=labels_ahead)
    valid = torch.rand(rows, length, generator=torch.Generator().manual_seed(2)) < 0.7
    valid[:, 2:4] = True
    labels = labels.where(valid, IGNORE)
    return Batch(inputs.where(valid, 0), labels, valid=valid, labels_ahead=labels_ahead)


def needs_of(subject: Subject) -> frozenset[str]:
    """The fields of Output that the loss declares."""
    needs: frozenset[str] = getattr(subject.component, "needs", frozenset())
    return needs


def make_output(subject: Subject, batch: Batch, *, seed: int = 3) -> Output:
    """Random hidden states; logits, their logsumexp and a scorer if the loss declares that it needs
    them.
    """
    shape, needs = batch.inputs.shape, needs_of(subject)
    states = random_normal(*shape, DIMS.d_model, seed=seed).requires_grad_()
    logits = random_normal(*shape, VOCAB_SIZE, seed=seed + 1).requires_grad_()
    logsumexp = logits.detach().logsumexp(-1).masked_fill(batch.labels == IGNORE, 0.0)
    output = Output(states)
    if "logits" in needs:
        output = output._replace(logits=logits)
    if "logsumexp" in needs:
        output = output._replace(logsumexp=logsumexp.requires_grad_())
    if "score" in needs:
        output = output._replace(score=score_by_random_table)
    return output


def score_by_random_table(states: Tensor, labels: Tensor) -> CrossEntropyOutput:
    """The cross-entropy of states [B, T, M] by a random head."""
    return dense_cross_entropy(states, random_normal(VOCAB_SIZE, DIMS.d_model, seed=9), labels)


def compute_loss(subject: Subject, out: Output, batch: Batch) -> LossSum:
    """The loss of a batch."""
    loss = subject.module()(out, batch)
    require(
        isinstance(loss, LossSum),
        f"forward returns {type(loss).__name__}, not LossSum(total, count)",
    )
    return loss


def total_of(loss: LossSum) -> float:
    """The total as a number."""
    return float(loss.total.detach())


def select_rows(out: Output, batch: Batch, rows: Any) -> tuple[Output, Batch]:
    """Some rows of an output and its batch; ``rows`` is an index."""
    fields = [field[rows] if isinstance(field, Tensor) else field for field in out]
    return Output(*fields), batch.map(lambda tensor: tensor[rows])  # type: ignore[arg-type]


@rule(
    "needs",
    ("loss",),
    why=(
        "logits are computed only if a loss declares that it needs them: they are the largest"
        " tensor of all"
    ),
    fix=(
        'declare needs = frozenset({"logits"}), {"logsumexp"}, {"score"} or {"states"}, and use'
        " nothing else"
    ),
    after=("interface",),
)
def needs_are_declared(subject: Subject) -> None:
    """The loss can be computed from what it declares."""
    batch, needs = make_batch(subject), needs_of(subject)
    require(needs <= set(Output._fields), f"needs is {set(needs)}")
    compute_loss(subject, make_output(subject, batch), batch)


@rule(
    "count",
    ("loss",),
    why=(
        "the denominator of a global batch must be known before the backward pass of its first"
        " micro-batch"
    ),
    fix="override count(batch) so that it returns what forward will count",
    after=("needs",),
)
def count_is_right(subject: Subject) -> None:
    """count(batch) is what forward counts, with padding and without, with labels after the segment
    and without.
    """
    for padded, ahead in ((False, True), (True, True), (True, False)):
        batch = make_batch(subject, padded=padded, ahead=ahead)
        announced = int(subject.module().count(batch))  # type: ignore[operator]
        counted = int(compute_loss(subject, make_output(subject, batch), batch).count)
        require(announced == counted, f"count() returns {announced}, forward counts {counted}")


@rule(
    "micro-batches",
    ("loss",),
    why=(
        "a batch that is split into micro-batches or over data-parallel ranks must have the loss of"
        " the whole"
    ),
    fix="return the sum as total and the number of terms as count; never a mean",
    after=("count",),
)
def micro_batches_add_up(subject: Subject) -> None:
    """Totals and counts of micro-batches add up, in any order of rows."""
    batch = make_batch(subject)
    out = make_output(subject, batch)
    whole = compute_loss(subject, out, batch)
    splits = [
        compute_loss(subject, *select_rows(out, batch, rows)) for rows in (slice(0, 1), slice(1, 4))
    ]
    total, count = (
        sum(total_of(loss) for loss in splits),
        sum(int(loss.count) for loss in splits),
    )
    tolerance = 1e-9 * max(1, abs(total))
    require(
        abs(total - total_of(whole)) <= tolerance,
        f"totals of micro-batches add up to {describe_sums(total, total_of(whole))}",
    )
    require(
        count == int(whole.count),
        f"counts of micro-batches add up to {count}, not to {int(whole.count)}",
    )
    permuted = compute_loss(subject, *select_rows(out, batch, torch.tensor([2, 0, 3, 1])))
    require(
        abs(total_of(permuted) - total_of(whole)) <= tolerance,
        "the order of rows changes the total",
    )


@rule(
    "padding",
    ("loss",),
    why="padding is not text: its contents must not matter",
    fix="leave out tokens where batch.valid is False (and labels that are IGNORE)",
    after=("needs", "micro-batches"),
)
def ignores_padding(subject: Subject) -> None:
    """Other hidden states, logits and ids at padding leave the loss as it was."""
    batch = make_batch(subject)
    out, other = make_output(subject, batch), make_output(subject, batch, seed=20)
    valid = batch.valid
    assert valid is not None

    def replace_at_padding(own: Tensor | None, replacement: Tensor | None) -> Any:
        if own is None or replacement is None:
            return None
        return own.where(valid[..., None], replacement)

    changed = out._replace(  # logsumexp is 0 at padding
        states=replace_at_padding(out.states, other.states),
        logits=replace_at_padding(out.logits, other.logits),
    )
    before = compute_loss(subject, out, batch)
    after = compute_loss(subject, changed, batch._replace(inputs=batch.inputs.where(valid, 7)))
    error = abs(total_of(before) - total_of(after))
    require(error <= 1e-9, f"the total depends on what is at padding, by {error:.2g}")
    require(int(before.count) == int(after.count), "the count depends on what is at padding")


@rule(
    "loss gradient",
    ("loss",),
    why="a loss that is cut off from the model is reported, and trains nothing",
    fix="compute the total from tensors with gradients: no detach() or .item() before it",
    after=("needs",),
)
def loss_has_a_gradient(subject: Subject) -> None:
    """The total can be differentiated by one of the fields that the loss reads."""
    batch = make_batch(subject)
    out = make_output(subject, batch)
    total = compute_loss(subject, out, batch).total
    require(total.requires_grad, "the total is detached: it has no gradient")
    inputs = [field for field in out if isinstance(field, Tensor)]
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    reached = any(gradient is not None for gradient in gradients)
    require(reached, "the total depends on none of the model's outputs")


@rule(
    "gradcheck",
    ("loss",),
    why="a wrong derivative minimises another loss than the one that is reported",
    fix="check custom backward functions; keep float64 float64",
    after=("loss gradient",),
)
def loss_derivatives_are_right(subject: Subject) -> None:
    """Derivatives agree with finite differences in float64, and are finite if all is padding."""
    batch = make_batch(subject, 2, 4)
    # finite differences are wrong near a kink, of a hinge say
    if error := error_at_most_points(lambda seed: check_loss_derivatives(subject, batch, seed)):
        raise error
    padding = Batch(
        batch.inputs,
        torch.full_like(batch.labels, IGNORE),
        valid=torch.zeros_like(batch.inputs, dtype=torch.bool),
    )
    out = make_output(subject, padding)
    loss = compute_loss(subject, out, padding)
    if loss.total.requires_grad:
        loss.total.backward()
        for name, tensor in out._asdict().items():
            if isinstance(tensor, Tensor) and tensor.grad is not None:
                require(
                    tensor.grad.isfinite().all(),
                    f"the gradient of {name} is not finite for a batch of padding",
                )


def check_loss_derivatives(subject: Subject, batch: Batch, seed: int) -> None:
    """Compare derivatives at one point. Raises RuntimeError where they disagree."""
    output = make_output(subject, batch, seed=seed)
    inputs = {name: field for name, field in output._asdict().items() if isinstance(field, Tensor)}

    module = subject.module()

    def total(*values: Tensor) -> Tensor:
        out = Output(**dict(zip(inputs, values, strict=True)), score=output.score)
        loss: LossSum = module(out, batch)
        return loss.total

    torch.autograd.gradcheck(total, list(inputs.values()))
