"""What a run leaves beside its checkpoints survives a loss of power too, and what is damaged all
the same stops nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import inside, lines, saved_steps, write_recipe

from lswt_core.ablation.report.publish import claim
from lswt_core.ablation.runs.run_records import read_environment, read_run_record
from lswt_core.ablation.runs.store import RunStore
from lswt_core.checkpoint import Files
from lswt_core.distributed.world import World
from lswt_core.errors import CheckpointError, ResourceError, UsageError
from lswt_core.plugin_api.atomic_write import STALE_SECONDS, open_atomically, write_atomically
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.train.announce import announce_needs

PLAIN = ("optimizer.use=adamw", "checkpoint.every=6", "--out", "run")


class Disk:
    """What is known to have reached the disk: the length of files by inode, and directories' names
    since the last change.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lengths: dict[int, int] = {}
        self.renamed: dict[Path, bool] = {}  # by directory: is a rename in it still to be written?
        # metrics.jsonl at every checkpoint: bytes it had, bytes on the disk
        self.published: list[tuple[int, int]] = []
        fsync, replace, publish = os.fsync, os.replace, Files.rename

        def watched_fsync(descriptor: int) -> None:
            fsync(descriptor)
            status = os.fstat(descriptor)
            self.lengths[status.st_ino] = status.st_size
            self.renamed = {
                path: late and path.stat().st_ino != status.st_ino
                for path, late in self.renamed.items()
            }

        def watched_replace(source: Path, target: Path) -> None:
            assert self.whole(Path(source)), (
                f"{source} was renamed before its content was on the disk"
            )
            replace(source, target)
            self.renamed[Path(target).resolve().parent] = True

        def watched_publish(files: Files, source: Path, target: Path) -> None:
            metrics = target.parents[1] / "metrics.jsonl"
            status = metrics.stat()
            self.published.append((status.st_size, self.lengths.get(status.st_ino, 0)))
            assert not self.renamed[metrics.resolve().parent], (
                "metrics.jsonl may still lack its name"
            )
            publish(files, source, target)

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(os, "replace", watched_replace)
        monkeypatch.setattr(Files, "rename", watched_publish)

    def whole(self, path: Path) -> bool:
        status = path.stat()
        return self.lengths.get(status.st_ino) == status.st_size


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("durable"))


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        assert inside(patch, recipe, *PLAIN) == 0
    return recipe.parent / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_whatever_a_checkpoint_stands_on_is_on_the_disk_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    disk = Disk(monkeypatch)
    assert inside(monkeypatch, recipe, *PLAIN) == 0
    assert len(disk.published) == 2 and all(had == kept > 0 for had, kept in disk.published)
    run = tmp_path / "run"
    assert [path.name for path in run.iterdir() if path.is_file() and not disk.whole(path)] == [
        "lock"
    ]
    assert not any(disk.renamed.values())
    assert {run.stat().st_ino, tmp_path.stat().st_ino} <= disk.lengths.keys(), (
        "the run's own directory has its name on the disk"
    )


@pytest.mark.parametrize(
    ("content", "ended"),
    [(b"", False), (b'{"parameters": {', False), (b"null", False), (b"\0\0\0", False), (b"", True)],
)
def test_a_damaged_record_is_named_and_written_anew(
    recipe: Path,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    ended: bool,
) -> None:
    if not ended:
        shutil.rmtree(run / "checkpoints" / "step-00000012")
    run.joinpath("environment.json").write_bytes(content)
    assert inside(monkeypatch, recipe, *PLAIN[:-1], run) == 0
    output = capsys.readouterr().out
    assert [
        line
        for line in output.splitlines()
        if line.startswith("warning") and "environment.json" in line
    ]
    record = json.loads(run.joinpath("environment.json").read_text())
    assert record["device"] == "cpu" and "damaged" in record["warm_start"]
    assert saved_steps(run)[-1] == 12
    inside(monkeypatch, recipe, *PLAIN[:-1], run)
    assert "warning" not in capsys.readouterr().out


def test_a_finished_run_whose_report_is_empty_writes_it_again(
    recipe: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.joinpath("report.html").write_bytes(b"")
    assert inside(monkeypatch, recipe, *PLAIN[:-1], run) == 0
    assert "Evaluations" in run.joinpath("report.html").read_text()


def test_damaged_lines_of_steps_that_were_saved_are_named(
    recipe: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    metrics = run / "metrics.jsonl"
    written = metrics.read_bytes().splitlines(keepends=True)
    written[2] = b"\0" * (len(written[2]) - 1) + b"\n"
    metrics.write_bytes(b"".join(written) + b'{"step": 12, "lo')
    assert inside(monkeypatch, recipe, *PLAIN[:-1], run) == 0
    warned = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("warning") and "metrics.jsonl" in line
    ]
    assert len(warned) == 1 and "metrics.jsonl:3:" in warned[0]
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, *range(4, 13)]


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"record\.json.*No space left on device"):
        write_atomically(path, b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("record.json", b"old")
    ]


def test_what_a_killed_write_left_goes_with_a_later_one(tmp_path: Path) -> None:
    path, now = tmp_path / "record.json", time.time()
    ages = {".record.json.dead.tmp": 2 * STALE_SECONDS, ".record.json.live.tmp": 0}
    ages |= {".other.json.dead.tmp": 2 * STALE_SECONDS}
    for name, age in ages.items():
        tmp_path.joinpath(name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    write_atomically(path, b"new")
    assert {file.name for file in tmp_path.iterdir()} == {
        "record.json",
        ".record.json.live.tmp",
        ".other.json.dead.tmp",
    }


def test_a_failure_of_who_writes_is_passed_on_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), open_atomically(tmp_path / "record.json") as file:
        file.write(b"half")
        raise PermissionError
    assert list(tmp_path.iterdir()) == []


def test_the_disk_that_checkpoints_need_is_announced(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.load(run / "recipe.toml")
    newest = max(run.joinpath("checkpoints").iterdir())
    size = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    for free, is_enough in ((4 * size, True), (2 * size, False)):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        announce_needs(Console(log_every=1), recipe, Registry(), World(), run)
        (announced,) = [
            line for line in capsys.readouterr().out.splitlines() if "checkpoints" in line
        ]
        assert announced.startswith("checkpoints") == is_enough
        each = re.search(r"about ([0-9.]+) KB each, 2 kept", announced)
        assert each and float(each[1]) * 1000 == pytest.approx(size, rel=0.1)


def test_an_export_says_how_a_lost_record_is_made_again(run: Path) -> None:
    from lswt_core.hf.card import model_card  # imports transformers

    run.joinpath("environment.json").write_bytes(b"")
    has = {"code": True, "needs_code": False, "picture": False}
    with pytest.raises(CheckpointError, match=r"environment\.json"):
        model_card(run, Recipe.load(run / "recipe.toml"), 12, "here", **has)


def test_what_an_ablation_keeps_may_be_damaged_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = RunStore(tmp_path / "store")
    store.directory("a").mkdir(parents=True)
    store.directory("a").joinpath("outcome.json").write_bytes(b"")
    assert store.outcome("a") is None and "outcome.json" in caplog.text
    store.directory("a").joinpath("environment.json").write_bytes(b"")
    assert read_environment(store, ["a"]) == {"device": "cpu"}
    store.directory("a").joinpath("batches.txt").touch()
    assert read_run_record(store.directory("a")) is None
    store.directory("a").joinpath("start.json").write_bytes(b'{"torn')
    with pytest.raises(CheckpointError, match=r"start\.json"):
        read_run_record(store.directory("a"))
    tmp_path.joinpath("ablation.json").write_bytes(b"")
    claim(tmp_path, "mine")
    assert "ablation.json" in caplog.text
    claim(tmp_path, "mine")
    with pytest.raises(UsageError):
        claim(tmp_path, "another's")
