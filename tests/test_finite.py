"""Numbers that an update makes infinite or not a number end the run before they are saved, and the
advised command goes on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import final, inside, saved_steps, write_recipe

from lswt_core.checkpoint import verify

BURSTING = """
import torch
from lswt_adamw import AdamW
from lswt_core.hooks import hookimpl


class Bursting(AdamW):
    "AdamW whose update `at` makes a weight or moment infinite, unless its rate is low."

    name = "bursting"

    def __init__(self, groups, *, lr: float = 1e-3, at: int = 6, into: str = "weight"):
        super().__init__(groups, lr=lr)
        self.at, self.into = at, into

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        p = self.param_groups[0]["params"][0]
        if not p.is_meta and int(self.state[p]["step"]) == self.at and self.defaults["lr"] > 1e-4:
            where = p if self.into == "weight" else self.state[p][self.into]
            where.view(-1)[3] = torch.inf


@hookimpl
def lswt_components():
    return [Bursting]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tmp_path.joinpath("bursting.py").write_text(BURSTING)
    return write_recipe(tmp_path)


WORDS = ("--plugin", "bursting.py", "optimizer.use=bursting", "--out", "run", "--unchecked")


@pytest.mark.parametrize(
    ("at", "every", "left"),
    [
        (6, 4, [4]),  # noticed by the next step
        pytest.param(8, 4, [4], marks=pytest.mark.slow),  # noticed by the save
        pytest.param(12, 4, [4, 8], marks=pytest.mark.slow),  # the last update of all
        (2, 4, []),  # before anything was saved
    ],
)
def test_weights_that_an_update_makes_infinite_are_never_saved(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
    every: int,
    left: list[int],
) -> None:
    assert (
        inside(monkeypatch, recipe, *WORDS, f"optimizer.at={at}", f"checkpoint.every={every}") == 6
    )
    output = capsys.readouterr().err
    assert f"step {at} " in output
    assert ("--accept-changes" if left else "start again") in output
    run = recipe.parent / "run"
    assert saved_steps(run) == left
    advised = ["--resume", "--accept-changes"] if left else []
    assert (
        inside(monkeypatch, recipe, *WORDS, f"optimizer.at={at}", "optimizer.lr=1e-4", *advised)
        == 0
    )
    assert all(bool(tensor.isfinite().all()) for tensor in final(run).values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("into", ["exp_avg", "exp_avg_sq"])
def test_moments_that_are_not_finite_are_never_saved(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], into: str
) -> None:
    assert inside(monkeypatch, recipe, *WORDS, "optimizer.at=8", f"optimizer.into={into}") == 6
    assert into in capsys.readouterr().err
    assert saved_steps(recipe.parent / "run") == [4]
    verify(recipe.parent / "run" / "checkpoints" / "step-00000004")
