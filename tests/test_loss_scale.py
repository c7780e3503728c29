"""The loss scale of float16: exact, halved by overflow without losing a batch, and part of a checkpoint."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import DIMS, tiny, tokens
from lswt_adamw import AdamW
from lswt_schedules import Constant
from lswt_simctg import SimCtg
from lswt_sophia import SophiaG
from lswt_xl_cache import XlCache
from torch import Tensor
from trainers import PLAIN, Kept, trainer_of

from lswt_core.assemble import parameter_groups
from lswt_core.errors import NumericsError
from lswt_core.interfaces import Batch, Horizon
from lswt_core.loss import Loss
from lswt_core.parallel import LossScale, Precision, World
from lswt_core.step import Setting, Step
from lswt_core.train import Trainer

FLOAT16 = Precision(torch.float16, "as the original")
BATCHES = [Batch(tokens(4, 8, seed), tokens(4, 8, seed + 100)) for seed in range(5)]


def loss_of(dtype: torch.dtype = torch.float32) -> Loss:
    return Loss(tiny(dtype=dtype, std=0.2, memories={"xl": partial(XlCache, length=8)}), {"simctg": (SimCtg(DIMS), 0.5)})


def trainer(precision: Precision = FLOAT16, optimizer: Any = AdamW) -> tuple[Trainer, Kept]:
    loss = loss_of()
    return trainer_of(
        loss, optimizer(parameter_groups(loss), lr=1e-3), Constant(Horizon(99, 32)), BATCHES, micro_rows=2, precision=precision
    )


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.plan.setting.loss.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("labels", ["data", "sampled"])
@pytest.mark.parametrize("scale", [2.0**-3, 2.0**16, 2.0**40])
def test_a_power_of_two_changes_no_bit(labels: Any, scale: float) -> None:
    found = []
    for factor in (1.0, scale):
        loss = loss_of()
        step = Step(Setting(loss, World(), PLAIN, seed=0, rows=range(4), micro_rows=2), BATCHES[0], [None, None], 0, factor)
        step.backward(labels)
        found.append({name: p.grad for name, p in loss.named_parameters() if p.grad is not None})
    assert same(*found)


def test_it_grows_after_2000_good_steps_and_shrinks_at_once() -> None:
    scale = LossScale(FLOAT16)
    assert scale.value == 65_536
    for _ in range(1999):
        scale.grow()
    assert scale.value == 65_536
    scale.grow()
    assert scale.value == 131_072
    assert scale.shrink() and scale.value == 65_536
    scale.value = 1.0
    assert not scale.shrink() and scale.value == 1
    plain = LossScale(PLAIN)
    plain.grow()
    assert plain.value == 1 and not plain.shrink() and plain.state() is None


def test_an_overflow_halves_the_scale_and_takes_the_same_batch_again() -> None:
    run, kept = trainer()
    run.scale.value = 2.0**40
    before = weights(run)
    run.advance()
    assert run.scale.value == 2.0**39 and same(before, weights(run)) and not run.plan.optimizer.state
    assert (run.step, run.skipped, run.in_a_row, run.plan.rows.cursor) == (0, 0, 0, 0)  # type: ignore[attr-defined]
    assert not kept.logged and "step 1: a gradient overflowed float16; the batch is taken again at loss scale" in kept.warned[0]
    while run.step < 1:
        run.advance()
    assert 1 < run.scale.value < 2.0**30 and run.skipped == 0 and kept.logged[0]["loss_scale"] == run.scale.value
    fresh, _ = trainer()
    fresh.scale.value = run.scale.value
    fresh.advance()
    assert same(weights(fresh), weights(run))  # the failed attempts left no trace


def test_what_no_scale_can_mend_still_ends_the_run() -> None:
    run, _ = trainer()
    run.plan.setting.loss.decoder.vocabulary.table.weight.data.fill_(torch.nan)
    run.advance()
    assert (run.skipped, run.scale.value) == (1, 65_536)  # the loss itself is not finite: not the scale's fault
    run.advance()
    with pytest.raises(NumericsError):
        run.advance()


@pytest.mark.parametrize("optimizer", [AdamW, SophiaG])
def test_a_resumed_run_has_the_same_bits(optimizer: Any) -> None:
    run, _ = trainer(optimizer=optimizer)
    for _ in range(6):
        run.advance()
    groups, documents = run.capture()
    groups = {group: {name: tensor.clone() for name, tensor in named.items()} for group, named in groups.items()}
    resumed, _ = trainer(optimizer=optimizer)
    saved: Any = SimpleNamespace(tensors=groups.__getitem__, document=documents.__getitem__)
    resumed.restore(saved)
    assert (resumed.scale.value, resumed.scale.good) == (run.scale.value, run.scale.good) and run.scale.good > 0
    for one in (run, resumed):
        for _ in range(6):
            one.advance()
    assert same(weights(run), weights(resumed))


def test_float16_trains_as_float32_does() -> None:
    losses = []
    for precision in (PLAIN, FLOAT16):
        run, kept = trainer(precision)
        while run.step < 12:
            run.advance()
        losses.append([values["loss"] for values in kept.logged])
    assert losses[1] == pytest.approx(losses[0], abs=5e-3) and losses[0][-1] < losses[0][1]
