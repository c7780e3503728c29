"""Checkpoints that are written while training goes on: what is saved is what training stood at, and
a write that fails or is killed loses nothing that was saved before.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from processes import run
from runs import assert_same_bits, run_inside, saved_steps, write_recipe

from lswt_core.checkpoint import Files, Store, Written
from lswt_core.checkpoint.pieces import Piece, piece_of
from lswt_core.train.background_writer import BackgroundWriter, copy_to_host

ASYNCHRONOUS = "checkpoint.asynchronous=true"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


class Held(Files):
    """Writes no tensors before it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def write_tensors(self, path: Path, tensors: Mapping[str, Piece]) -> Written:
        assert self.let_go.wait(20)
        return super().write_tensors(path, tensors)


def test_what_is_written_is_what_was_copied(tmp_path: Path) -> None:
    files, saved = Held(), []
    store, writer = Store(tmp_path / "checkpoints", files=files), BackgroundWriter(saved.append)
    weight = torch.arange(6.0)
    copied = copy_to_host({"model": {"weight": piece_of(weight)}})
    writer.submit(lambda: store.save(3, copied, {}))
    weight.zero_()  # training goes on
    writer.poll()
    assert not saved and not store.steps()
    files.let_go.set()
    writer.wait()
    assert saved == [store.path(3)]
    assert store.open(3).tensors("model")["weight"].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_next_write_waits_for_the_last_and_raises_what_it_raised(tmp_path: Path) -> None:
    writer = BackgroundWriter(lambda path: None)

    def fail() -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.submit(fail)
    writer.close()
    assert writer.has_failed
    with pytest.raises(OSError, match="No space"):
        writer.submit(lambda: tmp_path)
    assert not writer.has_failed  # told once


@pytest.mark.slow
def test_a_run_saves_the_same_in_the_background(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, more in (("sync", ()), ("async", (ASYNCHRONOUS,))):
        done = run_inside(monkeypatch, capsys, recipe, "--out", recipe.parent / name, *more)
        assert done.returncode == 0 and "saved" in done.stdout
    assert_same_bits(recipe.parent / "sync", recipe.parent / "async")
    assert saved_steps(recipe.parent / "async") == saved_steps(recipe.parent / "sync")


def test_a_write_that_fails_ends_the_run_and_leaves_what_was_saved(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, writes = recipe.parent / "run", []
    write = Files.write_tensors

    def full(files: Files, path: Path, tensors: Mapping[str, Piece]) -> Written:
        writes.append(path)
        if len(writes) > 3:  # model, optimizer and memory of the first checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(files, path, tensors)

    monkeypatch.setattr(Files, "write_tensors", full)
    done = run_inside(monkeypatch, capsys, recipe, "--out", out, ASYNCHRONOUS)
    assert done.returncode == 7
    assert saved_steps(out) == [4]
    monkeypatch.setattr(Files, "write_tensors", write)
    assert run_inside(monkeypatch, capsys, recipe, "--out", out, ASYNCHRONOUS).returncode == 0
    assert run_inside(monkeypatch, capsys, recipe, "--out", recipe.parent / "whole").returncode == 0
    assert_same_bits(recipe.parent / "whole", out)


KILLED = """
import os, signal, sys
from lswt_core.checkpoint import Files
from lswt_core.run import main

writes = []
write = Files.write_tensors

def killed(files, path, tensors):
    writes.append(path)
    if len(writes) == {number}:
        path.write_bytes(b"half of a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(files, path, tensors)

Files.write_tensors = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 6, 8])
def test_a_kill_in_the_middle_of_a_write_loses_nothing(recipe: Path, number: int) -> None:
    out = recipe.parent / "run"
    recipe.parent.joinpath("killed.py").write_text(KILLED.format(number=number))
    words = [recipe, "--out", out, "sample.tokens=0", ASYNCHRONOUS]
    cache = {"LSWT_CACHE_DIR": recipe.parent / "cache"}
    done = run("killed", *words, cwd=recipe.parent, pictures=False, **cache)
    assert done.returncode == -9
    assert saved_steps(out) == ([4] if number < 7 else [4, 8])
    for directory in (out, recipe.parent / "whole"):
        words[2] = directory
        again = run("lswt_core.run", *words, cwd=recipe.parent, pictures=False, **cache)
        assert again.returncode == 0, again.stderr
    assert_same_bits(recipe.parent / "whole", out)
    assert not list(out.joinpath("checkpoints").glob(".tmp-*"))
