"""Whole runs, as a user starts them: what they print, write and exit with, and that stopping them changes no bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

RECIPE = """
[model]
d_model = 32
n_layers = 2
n_heads = 2
[embedding]
vocab_size = 320
d_vocab = 24
[memory.registers]
count = 2
[memory.xl]
use = "xl-cache"
length = 24
[loss.simctg]
weight = 0.1
[optimizer]
use = "sophia-g"
lr = 2e-3
refresh_every = 3
[schedule]
warmup_steps = 4
[data]
use = "text"
paths = ["{corpus}"]
[tokenizer]
use = "bytes"
[train]
rows = 4
context = 16
micro_rows = 2
steps = 12
log_every = 1
[evaluate]
every = 5
tokens = 256
rows = 2
[checkpoint]
every = 4
[sample]
tokens = 8
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = random.Random(0)
    for i in range(12):
        corpus.joinpath(f"{i}.txt").write_text(" ".join(words.choice(["sense", "and", "sensibility", "pride", "."]) for _ in range(200)))
    path = tmp_path / "nano.toml"
    path.write_text(RECIPE.format(corpus=corpus))
    return path


def command(recipe: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "lswt_core.run", str(recipe), *more]


def environment(recipe: Path) -> dict[str, str]:
    return os.environ | {"LSWT_CACHE_DIR": str(recipe.parent / "cache"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start(recipe: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(recipe, *more), env=environment(recipe), cwd=recipe.parent, capture_output=True, text=True, timeout=240)


def final(directory: Path) -> dict[str, object]:
    newest = max(directory.joinpath("checkpoints").glob("step-????????"))
    return {
        f"{group}/{key}": tensor
        for group in ("model", "optimizer", "memory")
        for key, tensor in load_file(newest / f"{group}.safetensors").items()
    }


def assert_same_bits(one: Path, other: Path) -> None:
    expected, found = final(one), final(other)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not expected[key].equal(found[key])] == []  # type: ignore[attr-defined]


def lines(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in directory.joinpath("metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_behind(recipe: Path) -> None:
    done = start(recipe, "--out", "run")
    run = recipe.parent / "run"
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("recipe.toml", "metrics.jsonl", "report.html", "curves.png", "sample.txt", "environment.json"):
        assert run.joinpath(name).stat().st_size > 0, name
    for text in ("memory.registers", "trainable", "attention sdpa", "precision float32", "weight decay", "unigram", "saved", "sample"):
        assert text in done.stdout, text
    assert len(list(run.joinpath("checkpoints").glob("step-????????"))) == 2
    trained = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert {"step", "tokens", "loss", "lr", "tokens_per_second", "loss/simctg", "optimizer/unclipped_share"} <= trained[-1].keys()
    assert trained[-1]["tokens"] == 12 * 4 * 16
    assert [line["step"] for line in lines(run) if "eval/loss" in line] == [5, 10, 12]

    again = start(recipe, "--out", "run")
    assert again.returncode == 0 and "finished" in again.stdout

    resolved = start(run / "recipe.toml", "--out", str(recipe.parent / "from-resolved"))
    assert resolved.returncode == 0, resolved.stderr
    assert_same_bits(run, recipe.parent / "from-resolved")


@pytest.mark.parametrize("memory", ["exact", "replay"])
def test_killed_at_any_instant_and_resumed_ends_with_the_same_bits(recipe: Path, memory: str) -> None:
    option = f"checkpoint.memory={memory}"
    assert start(recipe, option, "--out", "whole").returncode == 0
    instants = random.Random(memory)
    kills = 0
    for _ in range(12):
        process = subprocess.Popen(
            command(recipe, option, "--out", "killed"), env=environment(recipe), cwd=recipe.parent, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        wanted = instants.choice([b"step  1/12", b"step  3/12", b"step  6/12", b"step  8/12", b"step 11/12", b"saved"])
        for line in process.stdout:
            if line.startswith(wanted) and kills < 4:
                time.sleep(instants.random() * 0.05)
                process.kill()
                break
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 3
    assert_same_bits(recipe.parent / "whole", recipe.parent / "killed")
    losses = {line["step"]: line["loss"] for line in lines(recipe.parent / "whole") if "loss" in line}
    assert {line["step"]: line["loss"] for line in lines(recipe.parent / "killed") if "loss" in line} == losses


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_says_how_to_go_on_and_exits_75(recipe: Path, number: signal.Signals) -> None:
    assert start(recipe, "--out", "whole").returncode == 0
    process = subprocess.Popen(
        command(recipe, "--out", "stopped"),
        env=environment(recipe),
        cwd=recipe.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith("step  2/12"):
            process.send_signal(number)
    assert process.wait() == 75, seen
    assert "--resume" in seen and "saved" in seen
    resumed = start(recipe, "--out", "stopped", "--resume")
    assert resumed.returncode == 0 and "continuing from" in resumed.stdout
    assert_same_bits(recipe.parent / "whole", recipe.parent / "stopped")


def test_micro_batches_do_not_change_the_result(recipe: Path) -> None:
    assert start(recipe, "--out", "two").returncode == 0
    assert start(recipe, "train.micro_rows=4", "--out", "four").returncode == 0
    expected, found = final(recipe.parent / "two"), final(recipe.parent / "four")
    for key in expected:
        if key.startswith("model/"):
            assert expected[key].allclose(found[key], atol=2e-4), key  # type: ignore[attr-defined]


def test_two_processes_give_what_one_gives(recipe: Path) -> None:
    assert start(recipe, "--out", "one").returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lswt_core.run", str(recipe), "--out", "two"]
    done = subprocess.run(torchrun, env=environment(recipe), cwd=recipe.parent, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    expected, found = final(recipe.parent / "one"), final(recipe.parent / "two")
    assert expected.keys() == found.keys()
    for key in expected:
        assert expected[key].shape == found[key].shape  # type: ignore[attr-defined]
        if key.startswith("model/"):
            assert expected[key].allclose(found[key], atol=2e-4), key  # type: ignore[attr-defined]
    one, two = ([line["eval/loss"] for line in lines(recipe.parent / name) if "eval/loss" in line] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-4)


def test_a_changed_recipe_is_refused_with_what_changed(recipe: Path) -> None:
    assert start(recipe, "--out", "run", "train.steps=4", "schedule.warmup_steps=2").returncode == 0
    longer = start(recipe, "--out", "run", "train.steps=8", "schedule.warmup_steps=2")
    assert longer.returncode == 5 and "train.steps: 4 in the checkpoint, 8 now" in longer.stderr and "--accept-changes" in longer.stderr
    wider = start(recipe, "--out", "run", "train.steps=8", "model.d_model=64", "--accept-changes")
    assert wider.returncode == 5 and "model.d_model" in wider.stderr and "--out" in wider.stderr
    accepted = start(recipe, "--out", "run", "train.steps=8", "schedule.warmup_steps=2", "--accept-changes")
    assert accepted.returncode == 0 and "train.steps = 8 instead of 4" in accepted.stdout


def test_changed_data_is_refused_on_resume(recipe: Path) -> None:
    assert start(recipe, "--out", "run", "train.steps=4", "schedule.warmup_steps=2").returncode == 0
    recipe.parent.joinpath("corpus", "0.txt").write_text("another text " * 100)
    changed = start(recipe, "--out", "run", "train.steps=8", "schedule.warmup_steps=2", "--accept-changes")
    assert changed.returncode == 5 and "not what this run was trained on" in changed.stderr


@pytest.mark.parametrize(
    ("override", "code", "text"),
    [
        ("model.d_modle=64", 2, "d_model"),
        ("ffn.use=swigul", 2, "swiglu"),
        ("schedule.warmup_steps=100", 3, "warmup_steps"),
        ("attention.use=flash", 3, "CUDA"),
        ("data.paths=['nowhere']", 4, "nowhere"),
        ("embedding.vocab_size=200", 4, "vocab_size"),
        ("model.d_model=65536", 7, "memory"),
    ],
)
def test_what_cannot_run_says_so_before_it_starts(recipe: Path, override: str, code: int, text: str) -> None:
    failed = start(recipe, override, "--out", "run")
    assert failed.returncode == code, failed.stdout + failed.stderr
    assert text in failed.stderr and "Traceback" not in failed.stderr


def test_a_directory_in_use_is_left_alone(recipe: Path) -> None:
    from lswt_core.checkpoint import RunLock

    directory = recipe.parent / "run"
    directory.mkdir()
    with RunLock(directory):
        second = start(recipe, "--out", "run")
    assert second.returncode == 73 and re.search(rf"\b{os.getpid()}\b", second.stderr)


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(recipe: Path) -> None:
    failed = start(recipe, "optimizer.lr=1e30", "train.clip=1e30", "checkpoint.every=1", "--out", "run")
    assert failed.returncode == 6 and "not finite" in failed.stderr
    newest = max(recipe.parent.joinpath("run", "checkpoints").glob("step-????????"))
    assert all(bool(t.isfinite().all()) for t in load_file(newest / "optimizer.safetensors").values())
