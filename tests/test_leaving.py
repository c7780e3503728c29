"""A plugin that leaves the process instead of returning ends a command as a broken plugin does, by
name.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import inside, saved_steps, write_recipe

from lswt_core.__main__ import main
from lswt_core.conformance import checks
from lswt_core.interfaces import RunInfo, Tracker
from lswt_core.train.metrics import Metrics

LEAVING = """
import sys
from lswt_adamw import AdamW
from lswt_core.hooks import hookimpl
from lswt_schedules import Constant
from lswt_text import Text

{about}


def leave():
    {how}


class Leaving(AdamW):
    "AdamW that leaves at its sixth update."

    name = "leaving"

    def step(self, closure=None):
        super().step(closure)
        p = self.param_groups[0]["params"][0]
        if not p.is_meta and int(self.state[p]["step"]) == 6:
            leave()


class LeavingSchedule(Constant):
    "A schedule that cannot be made."

    name = "leaving"

    def __init__(self, horizon):
        leave()


class LeavingText(Text):
    "Text whose reader leaves."

    name = "leaving"

    def documents(self, split):
        leave()
        yield from super().documents(split)


@hookimpl
def lswt_components():
    return [Leaving, LeavingSchedule, LeavingText]
"""
WAYS = ["sys.exit(0)", "raise KeyboardInterrupt", "raise GeneratorExit"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def write(folder: Path, how: str = "sys.exit(0)", about: str = "") -> Path:
    path = folder / "leaving.py"
    path.write_text(LEAVING.format(how=how, about=about))
    return path


@pytest.mark.parametrize("how", WAYS)
def test_in_the_middle_of_a_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    words = ("--plugin", write(recipe.parent, how), "optimizer.use=leaving", "--out", "run")
    assert inside(monkeypatch, recipe, *words, "--unchecked") == 3
    output = capsys.readouterr().err
    assert "leaving.py:" in output and "optimizer/leaving" in output
    assert saved_steps(recipe.parent / "run") == [4]


@pytest.mark.parametrize("table", ["schedule", "data"])
def test_while_a_run_is_put_together(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], table: str
) -> None:
    more = [f"data.paths=['{recipe.parent / 'corpus'}']"] if table == "data" else []
    words = ("--plugin", write(recipe.parent), f"{table}.use=leaving", *more, "--out", "run")
    assert inside(monkeypatch, recipe, *words) == 3
    output = capsys.readouterr().err
    assert "leaving.py:" in output and f"{table}/leaving" in output


def test_when_it_is_imported(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(recipe.parent, about="sys.exit(0)")
    assert (
        inside(monkeypatch, recipe, "--plugin", path, "optimizer.use=leaving", "--out", "run") == 3
    )
    assert "leaving" in capsys.readouterr().err


def test_in_other_commands(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(recipe.parent)
    path.write_text(path.read_text().replace("if not p.is_meta and", "if p.is_meta or"))
    assert main(["plan", str(recipe), "--plugin", str(path), "optimizer.use=leaving"]) == 3
    assert "leaving.py:" in capsys.readouterr().err


def test_in_a_check(tmp_path: Path) -> None:
    write(tmp_path)
    outcomes = {
        one.result().outcome
        for one in checks(tmp_path / "leaving.py")
        if one.subject.kind == "schedule"
    }
    assert "FAILED" in outcomes


class Gone(Tracker):
    """Leaves the thread of the trackers."""

    name = "gone"

    def log(self, metrics: object, step: int) -> None:
        raise SystemExit(0)


def test_in_a_tracker_costs_the_others_nothing(tmp_path: Path) -> None:
    notices: list[str] = []
    steps: list[int] = []

    class Good(Gone):
        name = "good"

        def log(self, metrics: object, step: int) -> None:
            steps.append(step)

    run = RunInfo("trial", tmp_path, {})
    metrics = Metrics(tmp_path / "metrics.jsonl", [Gone(run), Good(run)], notice=notices.append)
    for step in range(3):
        metrics.log(step, {"loss": 1.0})
    metrics.close()
    assert steps == [0, 1, 2]
    assert len(notices) == 1
    assert "'gone' failed" in notices[0]
    assert "SystemExit" in notices[0]
