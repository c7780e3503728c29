"""Losses of logits against ten plain lines in float64, and what padding, documents and
micro-batches may not change.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

import pytest
import torch
from helpers import DIMS, VOCAB, distance, tokens
from test_step import ROWS, batch_of, differentiated, gradients, largest_gap, loss_of, step_of
from torch import Tensor

from lswt_core import Registry
from lswt_core.interfaces import IGNORE, Batch, LossSum, Output
from lswt_core.model.train_module import TrainModule

NAMES = ("z-loss", "unlikelihood")
every_loss = pytest.mark.parametrize("name", NAMES)


def term_of(name: str, logits: Tensor, batch: Batch) -> LossSum:
    """The loss of logits [B, T, V]."""
    loss: Any = Registry().get("loss", name)(DIMS)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return loss(
        Output(
            logits[..., :1], logits, wide.logsumexp(-1).masked_fill(batch.labels == IGNORE, 0.0)
        ),
        batch,
    )


def drawn(rows: int, length: int, size: int = VOCAB) -> Tensor:
    """Random logits in float64."""
    generator = torch.Generator().manual_seed(8)
    return (
        3 * torch.randn(rows, length, size, dtype=torch.float64, generator=generator)
    ).requires_grad_()


def plain(name: str, logits: Tensor, batch: Batch) -> Tensor:
    """The sum over predicted labels, token by token, as the papers say it."""
    total = logits.new_zeros(())
    for b, t in (batch.labels != IGNORE).nonzero().tolist():
        if name == "z-loss":
            total = total + logits[b, t].exp().sum().log() ** 2
            continue
        first = 0 if batch.first_visible is None else max(0, int(batch.first_visible[b, t]))
        earlier = {
            int(batch.inputs[b, j])
            for j in range(first, t + 1)
            if batch.valid is None or batch.valid[b, j]
        }
        p = logits[b, t].exp() / logits[b, t].exp().sum()
        for candidate in earlier - {int(batch.labels[b, t])}:
            total = total - torch.log(torch.clamp(1 - p[candidate], min=1e-5))
    return total


def batches() -> list[Batch]:
    """Without padding; with scattered padding and ignored labels; with parted documents. Few words,
    so that they return.
    """
    whole = Batch(tokens(3, 9, 1, 5), tokens(3, 9, 2, 5))
    borders = ([0, 4], [0, 3, 7], [-2])
    first_visible = torch.tensor(
        [[max(border for border in row if border <= t) for t in range(9)] for row in borders]
    )
    return [whole, batch_of(size=5), whole._replace(first_visible=first_visible)]


@every_loss
@pytest.mark.parametrize("batch", batches(), ids=["plain", "padded", "parted"])
def test_loss_and_gradient_are_the_papers(name: str, batch: Batch) -> None:
    logits = drawn(*batch.inputs.shape, 7)
    term, wanted = term_of(name, logits, batch), plain(name, logits, batch)
    assert distance(term.total, wanted) < 1e-10
    assert int(term.count) == int((batch.labels != IGNORE).sum())
    actual, expected = (torch.autograd.grad(total, logits)[0] for total in (term.total, wanted))
    assert distance(actual, expected) < 1e-10


def test_the_normaliser_of_equal_logits_is_their_number() -> None:
    ids = tokens(1, 1)
    assert float(
        term_of("z-loss", torch.zeros(1, 1, 50, dtype=torch.float64), Batch(ids, ids)).total
    ) == pytest.approx(math.log(50) ** 2)


def test_a_token_said_twice_is_one_candidate_and_the_label_is_none() -> None:
    batch = Batch(torch.tensor([[1, 1, 2]]), torch.tensor([[1, 2, 3]]))
    term = term_of("unlikelihood", torch.zeros(1, 3, 4, dtype=torch.float64), batch)
    assert float(term.total) == pytest.approx(3 * -math.log(3 / 4))  # {}, {1}, {1, 2}


def test_a_certain_repetition_costs_a_finite_sum_and_has_no_gradient() -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    logits = torch.tensor([[[100.0, 0.0]]], requires_grad=True)
    term = term_of("unlikelihood", logits, Batch(ids, ids + 1))
    term.total.backward()
    # 1 - 1e-5 is rounded in float32
    assert term.total.item() == pytest.approx(-math.log(1e-5), rel=1e-3)
    assert logits.grad is not None and not logits.grad.any()


@every_loss
def test_padding_may_hold_anything(name: str) -> None:
    batch = batch_of(size=5)
    assert batch.valid is not None
    batch = batch._replace(labels=batch.labels.masked_fill(~batch.valid, IGNORE))
    other = batch._replace(inputs=batch.inputs.masked_fill(~batch.valid, 4))
    logits = drawn(*batch.inputs.shape)
    elsewhere = logits.masked_fill(~batch.valid[..., None], 1e3)
    assert distance(term_of(name, logits, batch).total, term_of(name, elsewhere, other).total) == 0


@every_loss
def test_nothing_predicted_is_no_loss(name: str) -> None:
    ids, logits = tokens(2, 4), drawn(2, 4)
    term = term_of(name, logits, Batch(ids, torch.full_like(ids, IGNORE)))
    term.total.backward()
    assert not term.total.any() and not term.count.any()
    assert logits.grad is not None and not logits.grad.any()


@every_loss
def test_fractions_of_rows_add_up_to_the_batch(name: str) -> None:
    batch, logits = batch_of(size=5), drawn(ROWS, 6)
    rows = [
        term_of(name, logits[i : i + 1], batch.map(itemgetter(slice(i, i + 1))))
        for i in range(ROWS)
    ]
    whole = term_of(name, logits, batch)
    assert sum(int(term.count) for term in rows) == int(whole.count)
    assert distance(torch.stack([term.total for term in rows]).sum(), whole.total) < 1e-10


@every_loss
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batches_change_no_gradient(name: str, micro_batch_size: int) -> None:
    loss = TrainModule(loss_of().decoder, {name: (Registry().get("loss", name)(DIMS), 0.5)})
    whole, parted = (
        step_of(loss, ROWS, batch=batch_of()),
        step_of(loss, micro_batch_size, batch=batch_of()),
    )
    assert (
        largest_gap(differentiated(loss, whole, "data"), differentiated(loss, parted, "data"))
        < 1e-12
    )
    parted.check_counts()
    assert gradients(loss)


@every_loss
@pytest.mark.parametrize("trainable", [False, True])
def test_a_model_is_trained_by_the_papers_loss(name: str, trainable: bool) -> None:
    decoder, batch = loss_of().decoder, batch_of()
    decoder.vocabulary.table.requires_grad_(trainable)
    term = TrainModule(decoder, {name: (Registry().get("loss", name)(DIMS), 1.0)})(batch).terms[
        name
    ]
    expected = plain(name, decoder.vocabulary.logits(decoder(batch.inputs)[0]), batch)
    assert distance(term.total, expected) < 1e-10
    weights = [p for p in decoder.parameters() if p.requires_grad]
    pairs = zip(
        *(
            torch.autograd.grad(total, weights, materialize_grads=True)
            for total in (term.total, expected)
        ),
        strict=True,
    )
    assert max(distance(a, b) for a, b in pairs) < 1e-10


@every_loss
def test_half_precision_is_summed_in_float32(name: str) -> None:
    batch, logits = batch_of(size=5), drawn(ROWS, 6).detach().bfloat16()
    term = term_of(name, logits, batch).total
    assert term.dtype == torch.float32
    assert float(term) == pytest.approx(float(plain(name, logits.double(), batch)), rel=1e-5)
