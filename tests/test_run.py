"""Whole runs, as a user starts them: what they print, write and exit with, and that stopping them
changes no bit.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from processes import Done
from runs import (
    assert_same_bits,
    command,
    final,
    lines,
    run_inside,
    saved_steps,
    start,
    surroundings,
    write_recipe,
)

from lswt_core.checkpoint import RunLock


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run that nothing disturbs."""
    done = start(recipe, "--out", "whole", pictures=True)
    assert done.returncode == 0, done.stdout + done.stderr
    recipe.parent.joinpath("whole", "printed.txt").write_text(done.stdout)
    return recipe.parent / "whole"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def within(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """``within(recipe, words)``: the command in this process."""
    return partial(run_inside, monkeypatch, capsys)


def test_a_run_leaves_everything_behind(recipe: Path, whole: Path) -> None:
    for name in (
        "recipe.toml",
        "metrics.jsonl",
        "report.html",
        "curves.png",
        "sample.txt",
        "environment.json",
    ):
        assert whole.joinpath(name).stat().st_size > 0, name
    printed = whole.joinpath("printed.txt").read_text()
    for text in (
        "memory.registers",
        "trainable",
        "attention blocked",
        "precision float32",
        "weight decay",
        "unigram",
        "saved",
        "sample",
    ):
        assert text in printed, text
    assert len(list(whole.joinpath("checkpoints").glob("step-????????"))) == 2
    trained = [line for line in lines(whole) if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert {
        "step",
        "tokens",
        "loss",
        "lr",
        "tokens_per_second",
        "loss/simctg",
        "optimizer/unclipped_share",
    } <= trained[-1].keys()
    assert trained[-1]["tokens"] == 12 * 4 * 16
    # of the last Hessian update: after updates 1, 4, 7 and 10
    shares = [line["optimizer/unclipped_share"] for line in trained]
    assert [len(set(shares[first : first + 3])) for first in (0, 3, 6, 9)] == [1] * 4
    assert len(set(shares)) > 1
    assert [line["step"] for line in lines(whole) if "eval/loss" in line] == [5, 10, 12]
    again = start(recipe, "--out", "whole")
    assert again.returncode == 0 and "finished" in again.stdout


def test_the_resolved_recipe_is_the_run(whole: Path, out: Path, recipe: Path) -> None:
    done = start(recipe.with_name("whole") / "recipe.toml", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert_same_bits(whole, out)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["exact", "replay"])
def test_killed_at_any_instant_and_resumed_ends_with_the_same_bits(
    recipe: Path, tmp_path: Path, memory: str
) -> None:
    # so many steps that a kill that comes late does not come after the last
    words = [f"checkpoint.memory={memory}", "train.steps=60", "sample.tokens=0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(recipe, *words, "--out", str(whole)).returncode == 0
    instants = random.Random(memory)
    for event in ("step", "saved", "step", "step"):
        ahead = 3 + max([0, *saved_steps(killed)])  # reached wherever the last kill struck
        line_of_event = f"step {ahead:2}/60" if event == "step" else event
        with subprocess.Popen(
            command(recipe, *words, "--out", str(killed)),
            env=surroundings(recipe),
            cwd=recipe.parent,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert any(line.startswith(line_of_event) for line in process.stdout)
            time.sleep(instants.random() * 0.01)  # about a step
            process.kill()
        assert process.returncode == -signal.SIGKILL
    assert start(recipe, *words, "--out", str(killed)).returncode == 0
    assert_same_bits(whole, killed)
    assert [line["loss"] for line in lines(killed) if "loss" in line] == [
        line["loss"] for line in lines(whole) if "loss" in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "kept"),
    [
        ("window", "exact"),
        ("xl-hidden", "exact"),
        ("compressed", "exact"),
        ("compressed", "replay"),
    ],
)
def test_whatever_the_memory_a_resumed_run_ends_with_the_same_bits(
    recipe: Path, tmp_path: Path, memory: str, kept: str
) -> None:
    options = [
        f"memory.xl.use={memory}",
        "memory.xl.length=7",
        f"checkpoint.memory={kept}",
        "sample.tokens=0",
    ]
    options += ["memory.xl.slots=3", "memory.sink.use=sink-logit"] if memory == "compressed" else []
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert start(recipe, *options, "--out", str(whole)).returncode == 0
    shutil.copytree(whole, parted)
    shutil.rmtree(max(parted.joinpath("checkpoints").glob("step-????????")))
    resumed = start(recipe, *options, "--out", str(parted))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "continuing from" in resumed.stdout, resumed.stdout + resumed.stderr
    assert_same_bits(whole, parted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_says_how_to_go_on_and_exits_75(
    recipe: Path, whole: Path, out: Path, number: signal.Signals
) -> None:
    words = command(recipe, "--out", str(out))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=surroundings(recipe), cwd=recipe.parent, **streams) as process:  # type: ignore[call-overload]
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("step  2/12"):
                process.send_signal(number)
    assert process.returncode == 75, printed
    assert "--resume" in printed and "saved" in printed
    resumed = start(recipe, "--out", str(out), "--resume")
    assert resumed.returncode == 0 and "continuing from" in resumed.stdout
    assert_same_bits(whole, out)


def test_micro_batches_do_not_change_the_result(recipe: Path, whole: Path, out: Path) -> None:
    assert start(recipe, "train.micro_batch_size=4", "--out", str(out)).returncode == 0
    assert_close(whole, out)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(recipe: Path, whole: Path, out: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "lswt_core.run",
        str(recipe),
        "--out",
        str(out),
    ]
    done = subprocess.run(
        torchrun,
        env=surroundings(recipe),
        cwd=recipe.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_close(whole, out)
    one, two = (
        [line["eval/loss"] for line in lines(run) if "eval/loss" in line] for run in (whole, out)
    )
    assert two == pytest.approx(one, abs=1e-4)


def assert_close(one: Path, other: Path) -> None:
    """Sums were taken in another order, and Sophia's clip amplifies it a little."""
    expected, actual = final(one), final(other)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert tensor.shape == actual[key].shape, key  # type: ignore[attr-defined]
        assert not key.startswith("model/") or tensor.allclose(actual[key], atol=2e-4), key  # type: ignore[attr-defined]


def test_a_changed_recipe_is_refused_with_what_changed(
    recipe: Path, out: Path, within: Callable[..., Done]
) -> None:
    short = ("--out", str(out))
    first = within(recipe, *short, "train.steps=3")
    assert first.returncode == 0 and "75%" in first.stdout
    longer = within(recipe, *short, "train.steps=8")
    assert longer.returncode == 5
    assert re.search(r"train\.steps: 3 .* 8 ", longer.stderr)
    assert "--accept-changes" in longer.stderr
    wider = within(recipe, *short, "train.steps=8", "model.d_model=64", "--accept-changes")
    assert wider.returncode == 5 and "model.d_model" in wider.stderr and "--out" in wider.stderr
    accepted = within(recipe, *short, "train.steps=8", "--accept-changes")
    assert accepted.returncode == 0 and "train.steps = 8" in accepted.stdout


def test_changed_data_is_refused_on_resume(tmp_path: Path, within: Callable[..., Done]) -> None:
    recipe = write_recipe(tmp_path)
    assert (
        within(recipe, "--out", "run", "train.steps=4", "schedule.warmup_steps=2").returncode == 0
    )
    recipe.parent.joinpath("corpus", "0.txt").write_text("another text " * 100)
    changed = within(
        recipe, "--out", "run", "train.steps=8", "schedule.warmup_steps=2", "--accept-changes"
    )
    assert changed.returncode == 5 and "fingerprint" in changed.stderr


@pytest.mark.parametrize(
    ("override", "code", "text"),
    [
        ("model.d_modle=64", 2, "d_model"),
        ("ffn.use=swigul", 2, "swiglu"),
        ("schedule.use=wsd schedule.warm=1", 2, "warmup_steps"),
        ("attention.use=flash", 2, "CUDA"),
        ("data.paths=['nowhere']", 4, "nowhere"),
        ("embedding.vocab_size=200", 4, "vocab_size"),
        ("optimizer.fraction=0.1", 2, "of 4 rows is 0 rows"),
        ("model.d_model=65536", 7, "memory"),
    ],
)
def test_what_cannot_run_says_so_before_it_starts(
    recipe: Path, out: Path, override: str, code: int, text: str, within: Callable[..., Done]
) -> None:
    failed = within(recipe, *override.split(), "--out", str(out))
    assert failed.returncode == code, failed.stdout + failed.stderr
    assert text in failed.stderr and "Traceback" not in failed.stderr


def test_a_directory_in_use_is_left_alone(
    recipe: Path, out: Path, within: Callable[..., Done]
) -> None:
    out.mkdir()
    with RunLock(out):
        second = within(recipe, "--out", str(out))
    assert second.returncode == 73 and re.search(rf"\b{os.getpid()}\b", second.stderr)


def test_numbers_that_are_not_finite_stop_the_run_and_keep_the_checkpoint(
    recipe: Path, out: Path, within: Callable[..., Done]
) -> None:
    words = (
        "schedule.use=constant",
        "train.grad_clip=1e30",
        "checkpoint.every=1",
        "--out",
        str(out),
    )
    assert within(recipe, *words, "train.steps=2").returncode == 0
    failed = within(recipe, *words, "optimizer.lr=1e30", "--accept-changes")
    assert failed.returncode == 6
    assert "step 2 " in failed.stderr
    assert final(out).keys() and all(bool(t.isfinite().all()) for t in final(out).values())  # type: ignore[attr-defined]


CURVED = """
from lswt_core.hooks import hookimpl
from lswt_core.train.finite import NotFinite
from lswt_sophia import SophiaG


class Curved(SophiaG):
    name = "curved"

    def update_curvature(self, objective):
        self.calls = getattr(self, "calls", 0) + 1
        super().update_curvature(Unlucky(objective) if self.calls in ({calls}) else objective)


class Unlucky:
    def __init__(self, objective):
        self.tokens = objective.tokens

    def backward(self, labels):
        raise NotFinite


@hookimpl
def lswt_components():
    return [Curved]
"""


@pytest.mark.parametrize("shared", [False, True])
def test_a_curvature_that_is_not_finite_is_taken_with_the_next_update(
    recipe: Path, tmp_path: Path, shared: bool, within: Callable[..., Done]
) -> None:
    module, words = (
        tmp_path / "curved.py",
        [
            "optimizer.use=curved",
            "optimizer.hessian_update_interval=3",
            f"optimizer.shared_forward={str(shared).lower()}",
            "--unchecked",
        ],
    )
    module.write_text(CURVED.format(calls="2, 3"))
    done = within(recipe, *words, "--plugin", str(module), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.count("curvature estimate is not finite") + done.stderr.count("not finite") == 2
    ), done.stderr
    module.write_text(CURVED.format(calls="2, 3, 4"))
    done = within(recipe, *words, "--plugin", str(module), "--out", str(tmp_path / "other"))
    assert done.returncode == 6 and "3 estimates" in done.stderr


@pytest.mark.slow
def test_a_shared_forward_pass_is_the_same_in_micro_batches_and_processes_of_its_own(
    recipe: Path, tmp_path: Path
) -> None:
    words = [
        "optimizer.shared_forward=true",
        "optimizer.fraction=0.5",
        "checkpoint.every=5",
        "sample.tokens=0",
    ]
    one, other, parted = (tmp_path / name for name in ("one", "other", "parted"))
    assert start(recipe, *words, "--out", str(one)).returncode == 0
    assert start(recipe, *words, "train.micro_batch_size=1", "--out", str(other)).returncode == 0
    assert_close(one, other)
    shutil.copytree(one, parted)
    shutil.rmtree(max(parted.joinpath("checkpoints").glob("step-????????")))
    assert "continuing from" in start(recipe, *words, "--out", str(parted)).stdout
    assert_same_bits(one, parted)


def test_damaged_checkpoints_are_named_and_never_written_over(
    recipe: Path, out: Path, within: Callable[..., Done]
) -> None:
    assert within(recipe, "--out", str(out), "train.steps=8").returncode == 0
    earlier, newest = sorted(out.joinpath("checkpoints").glob("step-????????"))
    content = bytearray(newest.joinpath("model.safetensors").read_bytes())
    content[-1] ^= 1
    newest.joinpath("model.safetensors").write_bytes(content)
    again = within(recipe, "--out", str(out), "train.steps=8")
    assert again.returncode == 0, again.stderr
    assert f"{newest.name}" in again.stdout
    assert "model.safetensors" in again.stdout
    assert f"continuing from {earlier}" in again.stdout

    for checkpoint in out.joinpath("checkpoints").glob("step-????????"):
        checkpoint.joinpath("MANIFEST.json").write_text("")
    before = {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"
    }
    refused = within(recipe, "--out", str(out), "train.steps=8")
    assert refused.returncode == 5 and str(out / "checkpoints") in refused.stderr
    assert {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"
    } == before
