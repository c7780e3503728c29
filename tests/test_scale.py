"""The loss scale of float16: it is exact within range, is halved by overflows, and survives a
resume.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from runs import final, lines, start, write_recipe
from test_step import batch_of, differentiated, loss_of, step_of

from lswt_core.train.loss_scaler import GROWTH_INTERVAL, INITIAL_SCALE, LossScaler
from lswt_core.train.step import Step

CONSTANT = ("optimizer.use=adamw", "schedule.use=constant", "evaluate.every=0")
HALF = ("train.precision=float16", *CONSTANT)


@pytest.mark.parametrize("labels", ["data", "sampled"])
def test_a_power_of_two_changes_no_bit(labels: str) -> None:
    loss = loss_of(dtype=torch.float32)
    plain = step_of(loss, 2)
    scaled = Step(plain.context, batch_of(), plain.memory, plain.number, INITIAL_SCALE)
    actual, expected = differentiated(loss, scaled, labels), differentiated(loss, plain, labels)
    assert all(actual[name].equal(expected[name]) for name in expected)


def test_it_grows_when_steady_and_is_halved_by_overflows() -> None:
    scaler = LossScaler(torch.float16)
    assert scaler.scale == INITIAL_SCALE == 2.0**16
    for _ in range(GROWTH_INTERVAL):
        scaler.update(found_inf=False)
    assert scaler.state() == [2 * INITIAL_SCALE, 0]
    scaler.update(found_inf=False)
    assert scaler.explains_overflow(2.5)
    assert not scaler.explains_overflow(math.nan) and not scaler.explains_overflow(math.inf)
    scaler.update(found_inf=True)
    assert scaler.state() == [INITIAL_SCALE, 0]
    while scaler.scale > 1:
        scaler.update(found_inf=True)
    assert not scaler.explains_overflow(2.5), "a scale of 1 cannot be at fault"


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_other_precisions_have_none(precision: torch.dtype) -> None:
    scaler = LossScaler(precision)
    scaler.update(found_inf=False)
    assert scaler.state() == [1.0, 0] and not scaler.explains_overflow(1.0)
    scaler.load_state([2.0**12, 7])
    assert scaler.scale == 1.0


@pytest.mark.slow
def test_a_run_in_float16_learns_as_one_in_float32_and_resumes_to_the_bit(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for name, words in {"half": HALF, "whole": CONSTANT, "parts": (*HALF, "train.steps=8")}.items():
        done = start(recipe, *words, "--out", name)
        assert done.returncode == 0, done.stdout + done.stderr
    assert start(recipe, *HALF, "--out", "parts", "--accept-changes").returncode == 0
    half, whole = (
        [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
        for name in ("half", "whole")
    )
    assert half != whole and half == pytest.approx(whole, abs=0.02)
    one, other = final(tmp_path / "half"), final(tmp_path / "parts")
    assert all(one[name].equal(other[name]) for name in one)  # type: ignore[attr-defined]
    newest = max((tmp_path / "parts" / "checkpoints").glob("step-*"))
    assert json.loads((newest / "train.json").read_text())["loss_scale"] == [INITIAL_SCALE, 12]


@pytest.mark.slow
def test_an_overflow_leaves_the_batch_out_and_halves_the_scale(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    plugin = tmp_path / "steep.py"
    plugin.write_text(STEEP)
    done = start(
        recipe,
        *HALF,
        "--plugin",
        str(plugin),
        "loss.steep.weight=1.0",
        "--out",
        "run",
        "--unchecked",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("a float16 gradient overflowed; the loss scale is now") >= 4, (
        "more often than bad batches are forgiven"
    )
    assert len(lines(tmp_path / "run")) >= 12


STEEP = '''
"""A loss whose gradient with respect to float16 states is large."""
from lswt_core.hooks import hookimpl
from lswt_core.interfaces import AuxiliaryLoss, LossSum

class Steep(AuxiliaryLoss):
    """20,000 times the mean of the states, in float16."""
    name = "steep"
    def __init__(self, dims) -> None:
        super().__init__(dims)
    def forward(self, out, batch):
        count = self.count(batch)
        return LossSum((out.states.half() * 20000).mean().float() * count, count)

@hookimpl
def lswt_components() -> list[type]:
    return [Steep]
'''
