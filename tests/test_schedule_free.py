"""Schedule-Free AdamW: the paper's lines, the package bit for bit, and runs that are evaluated and
resumed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from optimizer_parts import drive, feed, gradients_of, small_model
from runs import assert_same_bits, final, lines, start, write_recipe
from schedulefree import AdamWScheduleFree
from torch import Tensor

from lswt_core import Registry
from lswt_core.checkpoint.train_state import optimizer_state, restore_optimizer
from lswt_core.errors import PluginError
from lswt_core.train.loop import TrainingLoop

ScheduleFree: Any = Registry().get("optimizer", "schedule-free")


def plain(
    p: Tensor, gradients: list[Tensor], rates: list[float], decay: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper with x kept apart, in float64: (x, y)."""
    x = y = z = p.detach()
    v, weights, peak = torch.zeros_like(p), 0.0, 0.0
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        v = 0.999 * v + 0.001 * g.double() ** 2
        peak = max(peak, lr)
        weights += peak**2
        z = z - lr * (g.double() / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + decay * y)
        x = x + peak**2 / weights * (z - x)
        y = 0.1 * z + 0.9 * x
    return x, y


def test_it_is_a_few_plain_lines() -> None:
    start_at, steps, rates = (
        small_model(torch.float64)[0],
        [gradients_of(i)[0] for i in range(8)],
        [1e-3, 5e-3, *[1e-2] * 6],
    )
    p = start_at.detach().clone().requires_grad_()
    optimizer = ScheduleFree([p], weight_decay=0.3)
    for g, lr in zip(steps, rates, strict=True):
        feed(optimizer, [p], [g], lr)
    x, y = plain(start_at, steps, rates, 0.3)
    torch.testing.assert_close(p.detach(), y, rtol=0, atol=1e-12)
    with optimizer.eval_parameters():
        torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-12)


def test_it_is_the_package_bit_for_bit_and_returns_exactly() -> None:
    ours, theirs = small_model(), small_model()
    optimizer, other = (
        ScheduleFree(ours, weight_decay=0.1),
        AdamWScheduleFree(theirs, weight_decay=0.1),
    )
    other.train()
    for step in range(9):
        feed(optimizer, ours, gradients_of(step))
        feed(other, theirs, gradients_of(step))
        with pytest.raises(KeyError), optimizer.eval_parameters():
            raise KeyError  # an evaluation that is interrupted
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    other.eval()
    with optimizer.eval_parameters():
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_checkpoint_of_the_average_continues_bit_for_bit() -> None:
    params = small_model()
    optimizer = ScheduleFree([{"name": "all", "params": params, "names": ["a", "b"]}])
    drive(optimizer, params, range(5))
    with optimizer.eval_parameters():
        tensors, document = optimizer_state(optimizer)
        twins = [p.detach().clone().requires_grad_() for p in params]
    assert not any(torch.equal(a, b) for a, b in zip(params, twins, strict=True))
    resumed = ScheduleFree([{"name": "all", "params": twins, "names": ["a", "b"]}])
    restore_optimizer(
        resumed,
        {name: tensor.clone() for name, tensor in tensors.items()},
        json.loads(json.dumps(document)),
    )
    drive(optimizer, params, range(5, 9))
    drive(resumed, twins, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


def test_an_evaluation_sees_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    params, weights = small_model(), []
    optimizer = ScheduleFree(params)
    drive(optimizer, params, range(5))
    with optimizer.eval_parameters():
        expected = [p.detach().clone() for p in params]
    monkeypatch.setattr(
        "lswt_core.train.loop.evaluate",
        lambda *_: weights.extend(p.detach().clone() for p in params) or {},
    )
    trainer = MagicMock(optimizer=optimizer, eval_parameters=optimizer.eval_parameters)
    loop = TrainingLoop(trainer, MagicMock(), MagicMock(), 0, 0, MagicMock())
    loop.evaluate()
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(PluginError, match=r"pip install 'lswt-core\[optimizers\]'"):
        ScheduleFree(small_model())


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["exact", "replay"])
def test_runs_are_judged_by_the_average_and_resume_to_the_bit(tmp_path: Path, memory: str) -> None:
    recipe = write_recipe(tmp_path)
    words = [
        "optimizer.use=schedule-free",
        "optimizer.lr=0.01",
        f"checkpoint.memory={memory}",
        "checkpoint.every=5",
    ]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    done = start(recipe, *words, "--out", str(whole))
    assert done.returncode == 0, done.stdout + done.stderr
    assert start(recipe, *words, "--out", str(parted)).returncode == 0
    newest = max(parted.joinpath("checkpoints").glob("step-????????"))
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    again = start(recipe, *words, "--out", str(parted), "--resume")
    assert again.returncode == 0 and "continuing from" in again.stdout, again.stdout + again.stderr
    assert_same_bits(whole, parted)
    assert [line["eval/loss"] for line in lines(whole) if "eval/loss" in line][-1] == lines(parted)[
        -1
    ]["eval/loss"]
    tensors = final(whole)
    name = next(
        key for key in tensors if key.startswith("optimizer/") and key.endswith("fc1.weight/z")
    )
    parameter = name.removeprefix("optimizer/").removesuffix("/z")
    y, z, x = tensors[f"optimizer/{parameter}/y"], tensors[name], tensors[f"model/{parameter}"]
    torch.testing.assert_close(y, 0.1 * z + 0.9 * x, rtol=0, atol=1e-6)  # type: ignore[operator]
    assert not torch.equal(x, y)  # type: ignore[arg-type]
