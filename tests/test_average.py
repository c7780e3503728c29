"""Averages of the weights: their rates, what a run evaluates and saves, and resuming."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lswt_averages import ExponentialMovingAverage, NoAverage
from runs import assert_same_bits, inside, lines, write_recipe
from safetensors.torch import load_file
from torch import Tensor, nn

from lswt_core.budget import budget
from lswt_core.distributed.world import World
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.train.averaging import AveragedWeights


def model_of(value: float) -> nn.Linear:
    """One weight, and a frozen one."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, value)
    model.bias.requires_grad_(False)
    return model


def test_the_average_is_the_sum_written_out() -> None:
    model, ema = model_of(0.0), ExponentialMovingAverage(decay=0.5, warmup=1)
    averaged = AveragedWeights(model, ema)
    for step, value in enumerate((1.0, 2.0, 4.0), start=1):
        nn.init.constant_(model.weight, value)
        averaged.update(step)
    assert averaged.averages["weight"].item() == 0.125 * 0 + 0.125 * 1 + 0.25 * 2 + 0.5 * 4
    assert list(averaged.averages) == ["weight"]
    with averaged.in_place():
        assert model.weight.item() == averaged.averages["weight"].item()
    assert model.weight.item() == 4.0
    nn.init.constant_(model.weight, 7.0)
    averaged.restart()
    assert averaged.averages["weight"].item() == 7.0


def test_the_decay_warms_up_and_skips_updates() -> None:
    ema = ExponentialMovingAverage(decay=0.9, warmup=10, every=2)
    rates = [ema.rate(step) for step in range(1, 5)]
    assert rates == [0.0, 1 - 2 / 11, 0.0, 1 - 3 / 12]
    assert ema.rate(10_000) == pytest.approx(0.1)
    assert not NoAverage().is_active


EMA = ("average.use=ema", "average.decay=0.8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run without an average and one with, of equal weights."""
    place = tmp_path_factory.mktemp("average")
    recipe, made = write_recipe(place), {"recipe": place / "nano.toml"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, words in (("plain", ()), ("ema", EMA)):
            made[name] = place / name
            assert inside(monkeypatch, recipe, *words, "--out", made[name]) == 0
    return made


def newest_tensors(run: Path, group: str) -> dict[str, Tensor]:
    """The tensors of a group of a run's last checkpoint."""
    newest = max((run / "checkpoints").glob("step-????????"))
    return load_file(newest / f"{group}.safetensors")


def test_training_is_that_without_an_average(runs: dict[str, Path]) -> None:
    plain, ema = lines(runs["plain"]), lines(runs["ema"])
    assert [one.get("loss") for one in plain] == [one.get("loss") for one in ema]
    trained, weights = (
        newest_tensors(runs["ema"], "trained"),
        newest_tensors(runs["plain"], "model"),
    )
    assert trained and all(torch.equal(tensor, weights[name]) for name, tensor in trained.items())


def test_the_average_is_what_is_evaluated_and_saved(runs: dict[str, Path]) -> None:
    averages, weights = newest_tensors(runs["ema"], "model"), newest_tensors(runs["plain"], "model")
    assert averages.keys() == weights.keys()
    assert not torch.equal(averages[some := next(iter(averages))], weights[some])
    held_out = [
        [one["eval/loss"] for one in lines(runs[name]) if "eval/loss" in one]
        for name in ("plain", "ema")
    ]
    assert held_out[0] != held_out[1]


def test_an_average_is_resumed_to_the_bit(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "again"
    shutil.copytree(runs["ema"], again)
    newest = max((again / "checkpoints").iterdir())
    shutil.rmtree(newest)
    assert inside(monkeypatch, runs["recipe"], *EMA, "--out", again) == 0
    assert_same_bits(runs["ema"], again)
    assert all(
        torch.equal(tensor, newest_tensors(again, "trained")[name])
        for name, tensor in newest_tensors(runs["ema"], "trained").items()
    )


def test_two_averages_are_refused(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (*EMA, "optimizer.use=schedule-free", "optimizer.lr=0.01")
    assert inside(monkeypatch, runs["recipe"], *words, "--out", tmp_path / "both") == 2
    assert "average.use = none" in capsys.readouterr().err


def test_an_average_is_planned(runs: dict[str, Path]) -> None:
    def parts(*words: str) -> dict[str, Any]:
        recipe = Recipe.load(runs["recipe"], words)
        return budget(recipe, Registry(), World(device=torch.device("cpu"))).memory.parts

    plain, ema = parts(), parts(*EMA)
    assert ema.pop("average") == plain["weights"]
    assert ema == plain
