"""Several processes of one run: who each of them is, what they share, and that they refuse to be
two runs.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from ranks import run_ranks
from runs import write_recipe

from lswt_core.device import configure_process
from lswt_core.distributed.launch import ProcessRank, read_launcher
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible, ResourceError

MET = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


# ---------- who a process is


@pytest.mark.parametrize(
    ("variables", "visible", "number"),
    [
        ({}, 4, 0),
        ({"LOCAL_RANK": "3"}, 4, 3),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", "SLURM_LOCALID": "1"}, 4, 2),
        ({"WORLD_SIZE": "4", "RANK": "2", "SLURM_LOCALID": "1"}, 4, 1),
        # a device of its own for every process
        ({"WORLD_SIZE": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "1"}, 1, 0),
        ({"WORLD_SIZE": "4", "RANK": "2"}, 1, 0),
        ({"WORLD_SIZE": "4", "RANK": "2"}, 0, 0),  # a CPU
        ({"SLURM_LOCALID": "1"}, 4, 0),  # a run of one process within a larger job
    ],
)
def test_which_accelerator_a_process_takes(
    variables: dict[str, str], visible: int, number: int
) -> None:
    rank = read_launcher(variables | MET)
    assert rank.device_number(visible) == number
    assert (rank.rank, rank.size) == ((2, 4) if "WORLD_SIZE" in variables else (0, 1))


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "4", "RANK": "2", **MET}, "LOCAL_RANK.*SLURM_LOCALID"),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2", **MET}, "LOCAL_RANK = 2"),
        ({"WORLD_SIZE": "4", "RANK": "2", "SLURM_LOCALID": "3", **MET}, "SLURM_LOCALID = 3"),
        ({"WORLD_SIZE": "4", "LOCAL_RANK": "0", **MET}, " RANK is"),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "4", "RANK": "4", **MET}, "RANK = 4"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE = 'four'"),
    ],
)
def test_a_process_that_does_not_know_its_accelerator_is_refused(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", *MET):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lswt_core.distributed.world.device_count", lambda: 2)
    with pytest.raises(Incompatible, match=named):
        World.read()


def test_only_configure_process_changes_settings_of_the_process() -> None:
    denormal = torch.tensor([1e-40])
    World.read()
    assert float(denormal * 1) > 0
    configure_process()
    assert float(denormal * 1) == 0


def test_a_launched_process_is_alone_by_itself() -> None:
    assert read_launcher({}) == ProcessRank(0, 1)


# ---------- what they share


@pytest.mark.parametrize(
    ("rows", "micro", "named"),
    [
        (9, None, "train.batch_size = 9"),
        (2, None, "train.batch_size = 2"),
        (12, 2, "train.micro_batch_size = 2"),
    ],
)
def test_rows_that_processes_cannot_share_are_refused_by_name(
    rows: int, micro: int | None, named: str
) -> None:
    with pytest.raises(ResourceError, match=named):
        World(1, 4).micro_batch_size(rows, micro)


@pytest.mark.parametrize(("micro", "found"), [(None, 6), (3, 3), (6, 6), (12, 6)])
def test_a_process_runs_as_many_rows_at_a_time_as_it_has(micro: int | None, found: int) -> None:
    assert World(1, 2).micro_batch_size(12, micro) == found


@pytest.mark.parametrize(("rows", "size"), [(1, 4), (8, 3), (6, 6), (5, 1)])
def test_held_out_rows_are_each_some_process(rows: int, size: int) -> None:
    shares = [World(rank, size).share(rows) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


WAITING = """
import time
from datetime import timedelta
from lswt_core.device import configure_process
import lswt_core.distributed.world

lswt_core.distributed.world.COLLECTIVE_TIMEOUT = timedelta(seconds=1)
with lswt_core.distributed.world.World.read().connected() as world:
    if world.rank == 0:
        time.sleep(1.5)  # as it prepares a text
    world.wait()
    print(world.gather_texts("ö" * world.rank))
"""


@pytest.mark.slow
def test_processes_wait_for_one_another_longer_than_within_a_step(tmp_path: Path) -> None:
    tmp_path.joinpath("waiting.py").write_text(WAITING)
    for done in run_ranks([("waiting",)] * 2, tmp_path):
        assert done.returncode == 0 and done.stdout == "['', 'ö']\n", done.stderr


# ---------- one run

PLUGIN = """
from lswt_gelu import Gelu
from lswt_core.hooks import hookimpl

class Own(Gelu):
    "{}"

    name = "own"

@hookimpl
def lswt_components():
    return [Own]
"""


@pytest.mark.slow
def test_processes_that_are_not_one_run_are_refused_before_the_first_step(tmp_path: Path) -> None:
    recipe, words = write_recipe(tmp_path), []
    for name, more in (("one", ()), ("two", ("train.seed=1",))):
        plugin = tmp_path / name / "own.py"
        plugin.parent.mkdir()
        plugin.write_text(PLUGIN.format(name))
        words.append(
            (
                "lswt_core.run",
                recipe,
                "ffn.use=own",
                "--plugin",
                plugin,
                "--out",
                tmp_path / name / "run",
                *more,
            )
        )
    for done in run_ranks(words, tmp_path, LSWT_CACHE_DIR=tmp_path / "cache"):
        assert done.returncode == 5, done.stdout + done.stderr
        differences = [
            line for line in done.stderr.splitlines() if line.startswith("  process 1: ")
        ]
        assert [line.split(" is ")[0].removeprefix("  process 1: ") for line in differences] == [
            "recipe.train.seed",
            "code.ffn/own.version",
            "code.ffn/own.sha256",
            "run directory",
        ]
        assert str(tmp_path / "one" / "run") in differences[-1]
        assert str(tmp_path / "two" / "run") in differences[-1]
    left = [
        path.name for name in ("one", "two") for path in tmp_path.joinpath(name, "run").iterdir()
    ]
    assert left == ["lock"] and not tmp_path.joinpath("cache").exists()


def runs(recipe: Path, *more: str, size: int = 2) -> list[list[object]]:
    """The command of every rank."""
    out = recipe.parent / "run"
    return [["lswt_core.run", recipe, "--out", out, *more] for _ in range(size)]


@pytest.mark.slow
def test_processes_that_would_cut_the_model_differently_are_refused(tmp_path: Path) -> None:
    commands = runs(write_recipe(tmp_path))
    commands[1].append("train.shard=2")
    for done in run_ranks(commands, tmp_path, LSWT_CACHE_DIR=tmp_path / "cache"):
        assert done.returncode == 5
        assert "process 1: recipe.train.shard is 2, but 1 in process 0" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (("train.batch_size=4",), "choose a multiple of 3"),
        (("train.batch_size=6", "train.shard=2"), "choose 1, 3 or 'all'"),
        (("train.batch_size=12", "train.micro_batch_size=3"), "choose a divisor of 4"),
    ],
)
def test_what_processes_cannot_share_is_refused_before_they_wait(
    tmp_path: Path, words: tuple[str, ...], cure: str
) -> None:
    recipe = write_recipe(tmp_path)
    # two of the three were not even started
    launcher = {"WORLD_SIZE": 3, "RANK": 1, "LOCAL_RANK": 1, "LSWT_RANK_TIMEOUT": 1, **MET}
    done = run(*runs(recipe, *words)[0], cwd=tmp_path, timeout=20, pictures=False, **launcher)  # type: ignore[arg-type]
    assert done.returncode == 7 and cure in done.stderr
    assert not tmp_path.joinpath("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_before_it_meets_the_others_is_named_by_them(
    tmp_path: Path, failing: int
) -> None:
    commands = runs(write_recipe(tmp_path))
    commands[failing][1] = tmp_path / "missing.toml"
    done = run_ranks(commands, tmp_path, LSWT_CACHE_DIR=tmp_path / "cache")
    assert done[failing].returncode == 2 and "missing.toml" in done[failing].stderr
    said = done[1 - failing].stderr.splitlines()[-1]
    assert done[1 - failing].returncode == 75 and said.startswith(f"error: rank {failing} on ")
    assert "missing.toml" in said


@pytest.mark.slow
def test_a_second_run_in_the_directory_is_refused_by_all(tmp_path: Path) -> None:
    from lswt_core.checkpoint import RunLock

    with RunLock(tmp_path / "run"):
        done = run_ranks(runs(write_recipe(tmp_path)), tmp_path)
    assert {one.returncode for one in done} == {73}
    assert all("is in use by process" in one.stderr for one in done)


@pytest.mark.slow
def test_a_second_run_on_the_port_is_refused(tmp_path: Path) -> None:
    command = runs(write_recipe(tmp_path))[0]
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        launcher = {"WORLD_SIZE": 2, "RANK": 0, **MET, "MASTER_PORT": taken.getsockname()[1]}
        done = run(*command, cwd=tmp_path, timeout=20, pictures=False, **launcher)  # type: ignore[arg-type]
    assert done.returncode == 2 and "another MASTER_PORT" in done.stderr


def test_processes_that_see_other_checkpoints_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lswt_core.checkpoint import Saved
    from lswt_core.errors import CheckpointError
    from lswt_core.train.agreement import require_same_checkpoint

    def gathered(world: World, text: str) -> list[str]:
        return ['{"checkpoint": "step-00000004 (0123)"}', text]

    monkeypatch.setattr(World, "gather_texts", gathered)
    saved: Any = type(
        "Found", (), {"path": Path("step-00000004"), "manifest": type("M", (), {"sha256": "0123"})}
    )
    require_same_checkpoint(World(1, 2), saved)
    nothing: Saved | None = None
    with pytest.raises(
        CheckpointError,
        match=r"process 1: .*'none'.*'step-00000004 \(0123\)'",
    ):
        require_same_checkpoint(World(1, 2), nothing)
