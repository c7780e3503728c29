"""Whole runs of a nano model, as a user starts them, for the tests of what they leave behind."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nano import NANO
from processes import Done, environment, run

from lswt_core.checkpoint import verify
from lswt_core.run import main

RECIPE = (
    NANO
    + """
[memory.xl]
use = "xl-cache"
length = 24
[optimizer]
use = "sophia-g"
lr = 2e-3
hessian_update_interval = 3
[schedule]
warmup_steps = 4
[tokenizer]
use = "bytes"
[train]
batch_size = 4
seq_len = 16
micro_batch_size = 2
precision = "float32"
steps = 12
log_every = 1
[evaluate]
every = 5
tokens = 256
batch_size = 1
[checkpoint]
every = 4
[sample]
tokens = 8
"""
)


def write_recipe(directory: Path) -> Path:
    corpus = directory / "corpus"
    corpus.mkdir()
    words = random.Random(0)
    for i in range(12):
        corpus.joinpath(f"{i}.txt").write_text(
            " ".join(
                words.choice(["sense", "and", "sensibility", "pride", "."]) for _ in range(200)
            )
        )
    path = directory / "nano.toml"
    path.write_text(RECIPE.format(corpus=corpus))
    return path


def write_shallow_recipe(directory: Path) -> Path:
    """The recipe with one layer and AdamW, for what does not depend on the model."""
    path = write_recipe(directory)
    path.write_text(
        path.read_text()
        .replace('"sophia-g"', '"adamw"')
        .replace("hessian_update_interval = 3\n", "")
        .replace("n_layers = 2", "n_layers = 1")
    )
    return path


def command(recipe: Path, *more: str) -> list[str]:
    """What a user types."""
    return [sys.executable, "-m", "lswt_core.run", str(recipe), *more]


def surroundings(recipe: Path) -> dict[str, str]:
    """Environment of a command whose output is read while it runs."""
    return environment(LSWT_CACHE_DIR=recipe.parent / "cache", PYTHONUNBUFFERED=1)


def start(recipe: Path, *more: str, pictures: bool = False) -> Done:
    """The command, from its beginning to its end."""
    return run(
        "lswt_core.run",
        recipe,
        *more,
        cwd=recipe.parent,
        pictures=pictures,
        LSWT_CACHE_DIR=recipe.parent / "cache",
    )


def final(directory: Path) -> dict[str, object]:
    saved = verify(max(directory.joinpath("checkpoints").glob("step-????????")))
    return {
        f"{group}/{key}": tensor
        for group in ("model", "optimizer", "memory")
        for key, tensor in saved.tensors(group).items()
    }


def assert_same_bits(one: Path, other: Path) -> None:
    expected, actual = final(one), final(other)
    assert expected.keys() == actual.keys()
    assert [key for key in expected if not expected[key].equal(actual[key])] == []  # type: ignore[attr-defined]


def lines(directory: Path) -> list[dict[str, float]]:
    return [
        json.loads(line) for line in directory.joinpath("metrics.jsonl").read_text().splitlines()
    ]


def inside(monkeypatch: pytest.MonkeyPatch, recipe: Path, *more: object) -> int:
    """The command within this process, without pictures and sample: its exit code. Half a second,
    where ``start`` takes two.
    """
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setenv("LSWT_CACHE_DIR", str(recipe.parent / "cache"))
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    return main([str(recipe), "sample.tokens=0", *map(str, more)])


def run_inside(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: Path,
    *more: object,
) -> Done:
    """``inside``, with what it prints."""
    capsys.readouterr()
    code = inside(monkeypatch, recipe, *more)
    return subprocess.CompletedProcess([], code, *capsys.readouterr())


def saved_steps(directory: Path) -> list[int]:
    """The steps of a run's published checkpoints."""
    return sorted(
        int(path.name.removeprefix("step-"))
        for path in directory.joinpath("checkpoints").glob("step-????????")
    )


def assert_resumes_to_the_bit(monkeypatch: pytest.MonkeyPatch, recipe: Path, *words: str) -> Path:
    """A run that goes on from its first checkpoint ends as one that was not stopped, whose
    directory is returned.
    """
    run, parted = recipe.parent / "run", recipe.parent / "parted"
    assert inside(monkeypatch, recipe, *words, "--out", "run") == 0
    shutil.copytree(run, parted)
    for later in sorted(parted.joinpath("checkpoints").glob("step-????????"))[1:]:
        shutil.rmtree(later)
    assert inside(monkeypatch, recipe, *words, "--out", "parted") == 0
    assert_same_bits(run, parted)
    return run
