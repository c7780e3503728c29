"""SimCTG against the original authors' numbers (tests/golden/simctg/manifest.json), closed forms
and hand computation.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import lswt_simctg
import pytest
import torch
from helpers import DIMS, GOLDEN, distance
from lswt_simctg import SimCtg, dense, valid_pairs
from safetensors.torch import load_file
from torch import Tensor

from lswt_core.interfaces import Batch, LossSum, Output

NUMBERS = load_file(GOLDEN / "simctg" / "simctg.safetensors")
CASES = sorted({name.split("/")[0] for name in NUMBERS if name.endswith("/input_ids")})


def batch_of(case: str) -> Batch:
    """A golden case; 1 is padding."""
    ids = NUMBERS[f"{case}/input_ids"]
    return Batch(ids, NUMBERS[f"{case}/labels_m100"], valid=ids != 1)


def term_of(states: Tensor, margin: float, batch: Batch | None = None, **options: Any) -> LossSum:
    """The loss of states [B, T, M]; without a batch nothing is padding."""
    ids = torch.zeros(states.shape[:2], dtype=torch.int64)
    return SimCtg(DIMS, margin=margin, **options)(Output(states), batch or Batch(ids, ids))


def mean(term: LossSum) -> Tensor:
    """What a step with this term alone averages it to."""
    return term.total / term.count.clamp_min(1)


@pytest.mark.parametrize("case", [case for case in CASES if case != "everything"])
def test_loss_and_gradient_are_the_originals(case: str) -> None:
    states = NUMBERS["hidden"].double().requires_grad_()
    loss = mean(term_of(states, 0.5, batch_of(case)))
    loss.backward()
    assert distance(loss, NUMBERS[f"{case}/m0.5/lswt/cl_f64"]) < 1e-12
    assert states.grad is not None
    assert distance(states.grad, NUMBERS[f"{case}/m0.5/lswt/grad_hidden_cl_f64"]) < 1e-12
    assert (
        distance(
            mean(term_of(NUMBERS["hidden"], 0.5, batch_of(case))), NUMBERS[f"{case}/m0.5/lswt/cl"]
        )
        < 1e-6
    )


@pytest.mark.parametrize(
    "case, agree", [("nopad", True), ("trailing", True), ("allpadrow", True), ("scattered", False)]
)
def test_the_paper_authors_code_agrees_where_pads_are_at_the_end(case: str, agree: bool) -> None:
    term = mean(term_of(NUMBERS["hidden"].double(), 0.5, batch_of(case)))
    assert (distance(term, NUMBERS[f"{case}/m0.5/official/cl_f64"]) < 1e-12) is agree


@pytest.mark.parametrize("case", [case for case in CASES if case != "everything"])
def test_pads_taken_to_be_on_the_right_are_the_paper_authors_code(case: str) -> None:
    states = NUMBERS["hidden"].double().requires_grad_()
    loss = mean(term_of(states, 0.5, batch_of(case), pads="right"))
    loss.backward()
    assert distance(loss, NUMBERS[f"{case}/m0.5/official/cl_f64"]) < 1e-12
    assert states.grad is not None
    assert distance(states.grad, NUMBERS[f"{case}/m0.5/official/grad_hidden_cl_f64"]) < 1e-12


def test_a_batch_without_a_pair_can_be_not_a_number_as_in_the_original() -> None:
    states = NUMBERS["hidden"].double()
    term = term_of(states, 0.5, batch_of("everything"), empty="nan")
    assert mean(term).isnan() and NUMBERS["everything/m0.5/lswt/cl_f64"].isnan()
    assert torch.equal(
        term_of(states, 0.5, batch_of("allpadrow"), empty="nan").total,
        term_of(states, 0.5, batch_of("allpadrow")).total,
    )


def test_a_batch_without_a_pair_is_no_loss() -> None:
    states = NUMBERS["hidden"].clone().requires_grad_()
    term = term_of(states, 0.5, batch_of("everything"))
    mean(term).backward()
    assert not term.total.any() and not term.count.any()
    assert states.grad is not None and not states.grad.any()


@pytest.mark.parametrize(
    "margin, expected",
    [(0.0, 0.0), (0.25, 0.0), (0.5, 0.1380711875), (1.0, 0.4714045208), (2.0, 1.4714045208)],
)
def test_three_states_by_hand(margin: float, expected: float) -> None:
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    term = term_of(states, margin)
    assert int(term.count) == 6
    assert float(mean(term)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0, 1.7])
def test_equal_states_cost_the_margin_and_orthogonal_ones_nothing_up_to_one(margin: float) -> None:
    equal = torch.ones(1, 4, 3, dtype=torch.float64)
    assert float(mean(term_of(equal, margin))) == pytest.approx(margin, abs=1e-12)
    orthogonal = torch.eye(4, dtype=torch.float64)[None]
    assert float(mean(term_of(orthogonal, margin))) == pytest.approx(
        max(0.0, margin - 1), abs=1e-12
    )


def test_at_margin_two_no_hinge_is_flat_and_the_loss_has_a_closed_form() -> None:
    states = torch.randn(1, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = states[0] / states[0].norm(dim=-1, keepdim=True)
    expected = 1 + (unit.sum(0).square().sum() - 7) / (7 * 6)
    assert distance(mean(term_of(states, 2.0)), expected) < 1e-12


def test_zero_states_have_finite_loss_and_gradient() -> None:
    states = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    states[0, 1:3] = 0
    states.requires_grad_()
    loss = mean(term_of(states, 1.5))
    loss.backward()
    assert loss.isfinite() and states.grad is not None and states.grad.isfinite().all()


def test_padding_may_hold_anything() -> None:
    states, batch = NUMBERS["hidden"].double(), batch_of("scattered")
    assert batch.valid is not None
    other = states.masked_fill(~batch.valid[..., None], 1e3)
    assert distance(term_of(states, 0.5, batch).total, term_of(other, 0.5, batch).total) < 1e-12


def test_autocast_does_not_blur_the_hinge() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        term = mean(term_of(NUMBERS["hidden"], 0.5, batch_of("scattered")))
    assert distance(term, NUMBERS["scattered/m0.5/lswt/cl"]) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_fractions_of_rows_add_up_to_the_batch(case: str) -> None:
    states, batch = NUMBERS["hidden"].double(), batch_of(case)
    rows = [
        term_of(states[i : i + 1], 0.5, batch.map(itemgetter(slice(i, i + 1))))
        for i in range(len(states))
    ]
    whole = term_of(states, 0.5, batch)
    assert sum(int(term.count) for term in rows) == int(whole.count)
    assert distance(torch.stack([term.total for term in rows]).sum(), whole.total) < 1e-12


@pytest.mark.parametrize("block", [1, 5, 256])
@pytest.mark.parametrize("margin", [0.3, 0.9, 1.4, 2.5])
@pytest.mark.parametrize("spread", [0.05, 10.0], ids=["clustered", "scattered"])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_are_the_formula(
    block: int, margin: float, spread: float, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lswt_simctg, "BLOCK", block)
    generator = torch.Generator().manual_seed(3)
    # of hinges between clusters all are open, or none
    centres = torch.eye(4, dtype=torch.float64)[[0] * 5 + [1] * 3 + [0] * 5]
    states = (
        centres + spread * torch.randn(2, 13, 4, dtype=torch.float64, generator=generator)
    ).requires_grad_()
    valid = (
        torch.rand(2, 13, generator=generator) < 0.7
        if padded
        else torch.ones(2, 13, dtype=torch.bool)
    )
    ids = torch.zeros(2, 13, dtype=torch.int64)
    actual = term_of(states, margin, Batch(ids, ids, valid=valid if padded else None)).total
    expected = dense(states, margin, valid, valid_pairs(valid))
    assert expected > 1 and distance(actual, expected) < 1e-12
    assert (
        distance(
            *(
                torch.autograd.grad(0.7 * total, states, retain_graph=True)[0]
                for total in (actual, expected)
            )
        )
        < 1e-12
    )


def test_it_can_be_differentiated_twice() -> None:
    states = torch.randn(
        1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    ).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda states: term_of(states, 1.2).total, [states])


def test_under_autocast_the_gradient_is_as_precise_as_the_step() -> None:
    states = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(5)).requires_grad_()
    exact = torch.autograd.grad(term_of(states, 0.9).total, states)[0]
    with torch.autocast("cpu", torch.bfloat16):
        term = term_of(states, 0.9).total
    rounded = torch.autograd.grad(term, states)[0]
    assert float((rounded - exact).norm() / exact.norm()) < 2**-7
    assert distance(term, term_of(states, 0.9).total) < 1e-3  # of about 2,800
