"""Several lengths of training from one beginning: a run that goes on from another one's checkpoint
is, to the bit, the run from its first step.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import run
from runs import assert_same_bits, saved_steps, write_recipe

from lswt_core.__main__ import main
from lswt_core.ablation.horizons import shared_steps
from lswt_core.ablation.report.comparison_report import find_crossings
from lswt_core.ablation.runs import worker
from lswt_core.ablation.runs.branch import (
    BRANCHES,
    graft,
    remove_branches,
    request_branches,
)
from lswt_core.ablation.runs.store import RunStore
from lswt_core.checkpoint import RunLock
from lswt_core.recipe import Recipe

# a decay from step 4 of 8, and from step 7 of 14; no checkpoint is due there
OPTIONS = (
    "schedule.use=wsd",
    "schedule.decay_share=0.5",
    "schedule.warmup_steps=3",
    "evaluate.every=3",
    "checkpoint.every=5",
    "average.use=ema",
    "sample.tokens=0",
)
SHORT, LONG, STEP = 8, 14, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("horizons")).parent


def recipe_of(place: Path, steps: int, *more: str) -> Recipe:
    return Recipe.load(place / "nano.toml", (*OPTIONS, f"train.steps={steps}", *more))


def work(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, directory: Path) -> None:
    """A run as the ablation starts it, within this process."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "given.toml"
    path.write_text(recipe.dump())
    monkeypatch.setenv("LSWT_CACHE_DIR", str(directory.parents[1] / "cache"))
    monkeypatch.setattr(sys, "argv", ["worker", str(path), str(directory)])
    assert worker.main() == 0


@pytest.fixture(scope="module")
def runs(place: Path) -> Path:
    """A long run that kept the checkpoint of STEP, and a short one from its first step."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        request_branches(place / "runs" / "long", [STEP])
        work(monkeypatch, recipe_of(place, LONG), place / "runs" / "long")
        work(monkeypatch, recipe_of(place, SHORT), place / "runs" / "whole")
    return place / "runs"


def outcome(directory: Path) -> dict[str, Any]:
    """What a run came to, but for its speed and memory."""
    path = RunStore(directory.parent).read(directory.name)
    assert path is not None
    return replace(path, tokens_per_second=None, peak_bytes=None, seconds=0.0).to_json()


def logged(directory: Path) -> list[dict[str, float]]:
    """The log of a run, but for its speed."""
    entries = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    left_out = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in entry.items() if k not in left_out} for entry in entries]


@pytest.mark.slow
def test_a_run_from_a_shared_beginning_is_the_run_from_its_first_step(
    runs: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saved_steps(runs / "long")[-1] == LONG and STEP not in saved_steps(runs / "long")
    assert graft(runs / "long", STEP, runs / "grafted", recipe_of(place, SHORT))
    assert saved_steps(runs / "grafted") == [STEP]
    work(monkeypatch, recipe_of(place, SHORT), runs / "grafted")
    assert_same_bits(runs / "whole", runs / "grafted")
    assert outcome(runs / "whole") == outcome(runs / "grafted")
    assert logged(runs / "whole") == logged(runs / "grafted")
    for name in ("batches.txt", "start.json"):
        assert (runs / "whole" / name).read_bytes() == (runs / "grafted" / name).read_bytes()
    assert len((runs / "grafted" / "batches.txt").read_text().splitlines()) == SHORT


@pytest.mark.slow
def test_what_is_not_the_same_run_begins_at_its_first_step(
    runs: Path, place: Path, tmp_path: Path
) -> None:
    def grafts(*words: str, trunk: Path = runs / "long", into: Path | None = None) -> bool:
        return graft(trunk, STEP, into or tmp_path / "other", recipe_of(place, SHORT, *words))

    assert not grafts("optimizer.lr=3e-3")
    assert not grafts("train.seed=1")
    assert not grafts("checkpoint.memory=replay"), "memories would not be those that were trained"
    assert not grafts(into=runs / "whole"), "it has begun"
    with RunLock(tmp_path / "busy"):
        assert not grafts(into=tmp_path / "busy"), "another process makes it"
    damaged = tmp_path / "damaged"
    shutil.copytree(runs / "long" / BRANCHES, damaged / BRANCHES)
    file = next((damaged / BRANCHES).glob("*/model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert not grafts(trunk=damaged)
    assert not list((tmp_path / "other").glob("checkpoints/step-*"))
    remove_branches(damaged)
    assert not grafts(trunk=damaged)


def test_runs_share_their_beginning_until_the_shorter_one_decays(place: Path) -> None:
    def shared(*words: str) -> int:
        words = ("schedule.warmup_steps=3", *words)
        shorter, longer = (
            Recipe.load(place / "nano.toml", (*words, f"train.steps={steps}"))
            for steps in (SHORT, LONG)
        )
        return shared_steps(shorter, longer)

    assert shared("schedule.use=wsd", "schedule.decay_share=0.5") == STEP
    assert shared("schedule.use=wsd", "schedule.decay_share=0.25") == 6
    assert shared("schedule.use=constant") == SHORT - 1
    assert shared("schedule.use=cosine") == 3, "its warm-up"


@pytest.mark.usefixtures("budgets_once")
def test_a_schedule_that_never_is_constant_is_refused_before_training(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--swap", "ffn=gelu", "--dry-run", "--horizons", "0.5,2", "schedule.warmup_steps=2"]
    assert main(["ablate", str(place / "nano.toml"), *words]) == 2
    assert "schedule.use = cosine" in (told := capsys.readouterr().err)
    assert "schedule.use=wsd" in told and "from update 3 on" in told


@pytest.mark.parametrize("multiples", ["0,1", "half", "-1", "inf", "nan"])
def test_lengths_that_are_no_multiples_are_refused(
    place: Path, multiples: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--swap", "ffn=gelu", f"--horizons={multiples}"]
    assert main(["ablate", str(place / "nano.toml"), *words]) == 2
    assert "0.5,1,2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_at_several_lengths_has_the_numbers_of_separate_studies(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    words = ["lswt_core", "ablate", recipe, *OPTIONS, "--swap", "ffn=gelu", "--seeds", "1"]
    words += ["--jobs", "2"]
    cache = tmp_path / "cache"
    whole = run(*words, "--horizons", "0.5", "--out", "out", cwd=tmp_path, LSWT_CACHE_DIR=cache)
    assert whole.returncode == 0, whole.stderr
    options = ["train.steps=6", "--store", "apart", "--out", "short"]
    apart = run(*words, *options, cwd=tmp_path, LSWT_CACHE_DIR=cache)
    assert apart.returncode == 0, apart.stderr
    half = json.loads((tmp_path / "out" / "report.json").read_text())["horizons"]["at"][0]
    alone = json.loads((tmp_path / "short" / "report.json").read_text())
    assert half["steps"] == 6
    for key in ("delta", "values", "ci95", "documents_ci95"):
        assert half["comparisons"][0][key] == alone["comparisons"][0][key]
    store = tmp_path / "runs" / "store"
    shared = {path.parent.name for path in (tmp_path / "apart").glob("*/outcome.json")}
    assert len(shared) == 2 and all("continuing from" in log(store / name) for name in shared)
    assert not list(store.glob(f"*/{BRANCHES}")), "checkpoints that were kept are removed"


def log(directory: Path) -> str:
    """What a run printed."""
    return (directory / "run.log").read_text()


def at(multiple: float, *entries: tuple[float, float | None]) -> dict[str, Any]:
    """An entry of report["horizons"]["at"] with some differences and their adjusted p values."""
    comparisons = [
        {"arm": f"arm {number}", "delta": delta, "p_horizons": p}
        for number, (delta, p) in enumerate(entries)
    ]
    return {"multiple": multiple, "comparisons": comparisons}


def test_curves_cross_where_a_resolved_difference_changes_its_sign() -> None:
    horizons = [
        at(0.5, (-0.2, 0.01), (-0.2, 0.01), (-0.2, 0.2)),
        at(1, (0.01, 0.5), (-0.1, 0.01), (0.1, 0.01)),
        at(2, (0.1, 0.04), (0.1, None), (0.2, 0.01)),
    ]
    crossings = list(find_crossings(horizons))
    assert crossings == [{"arm": "arm 0", "from": 0.5, "to": 2, "deltas": [-0.2, 0.1]}]
