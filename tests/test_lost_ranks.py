"""A process of a run is killed, stopped, asked to stop or ends with an error: the others say which,
end soon, and lose nothing that is saved.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Done
from ranks import run_ranks
from runs import saved_steps, surroundings, write_recipe

TIMEOUT = 5  # seconds until a rank is lost
# of what happens after the sixth of twelve updates, in one rank
DEED = """
import os, signal, subprocess, time
from lswt_adamw import AdamW
from lswt_core.hooks import hookimpl
from lswt_text import Text


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("a mistake of its own")


def stop():
    subprocess.Popen(["sh", "-c", f"sleep 9; kill -9 {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


def ask_launcher():
    os.kill(os.getppid(), signal.SIGTERM)


def sleep():
    time.sleep(1.4 * float(os.environ["LSWT_RANK_TIMEOUT"]))


def count():
    began = time.monotonic()
    while time.monotonic() < began + 1.4 * float(os.environ["LSWT_RANK_TIMEOUT"]):
        pass


def kill_once():
    with open("killed", "x"):
        kill()


def none():
    pass


class Doing(AdamW):
    "AdamW, after whose sixth update something happens."

    name = "doing"
    steps = 0

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if os.environ["DEED"] == "ask_at_once" and os.environ["RANK"] == os.environ["DEED_OF"]:
            ask()

    def step(self, closure=None):
        super().step(closure)
        if self.param_groups[0]["params"][0].is_meta:
            return
        self.steps += 1
        if os.environ["DEED"] == "kill_once" and os.path.exists("killed"):
            return
        if self.steps == 6 and os.environ["RANK"] == os.environ["DEED_OF"]:
            globals()[os.environ["DEED"]]()


class Stream(Text):
    "A stream, in which something happens before its first document is read."

    name, streaming = "stream", True

    def documents(self, split):
        if split == "train":
            globals()[os.environ["DEED"]]()
        yield from super().documents(split)


@hookimpl
def lswt_components():
    return [Doing, Stream]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tmp_path.joinpath("deed.py").write_text(DEED)
    return write_recipe(tmp_path)


def words(recipe: Path, *more: str) -> list[str]:
    """What is done after "python -m"."""
    return [
        "lswt_core.run",
        str(recipe),
        "--plugin",
        str(recipe.parent / "deed.py"),
        "--unchecked",
        "optimizer.use=doing",
        "--out",
        str(recipe.parent / "run"),
        *more,
    ]


def settings(recipe: Path, deed: str, rank: int) -> dict[str, object]:
    return {
        "DEED": deed,
        "DEED_OF": rank,
        "LSWT_RANK_TIMEOUT": TIMEOUT,
        "LSWT_CACHE_DIR": recipe.parent / "cache",
    }


def ranks(recipe: Path, deed: str, rank: int, size: int = 2) -> list[Done]:
    """Ranks that no agent started."""
    return run_ranks([words(recipe)] * size, recipe.parent, **settings(recipe, deed, rank))


def torchrun(recipe: Path, deed: str, rank: int, *more: str) -> Done:
    """The same under torchrun."""
    told = settings(recipe, deed, rank)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *more, "-m"]
    return subprocess.run(
        [*launcher, *words(recipe)],
        cwd=recipe.parent,
        env=surroundings(recipe) | {name: str(value) for name, value in told.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("deed", ["kill", "fail", "stop"])
def test_the_others_name_it_and_end(recipe: Path, deed: str, rank: int) -> None:
    done = ranks(recipe, deed, rank)
    assert done[1 - rank].returncode == 75, done[1 - rank].stderr
    assert done[rank].returncode == {"kill": -9, "stop": -9, "fail": 3}[deed]
    said = done[1 - rank].stderr.splitlines()[-1]
    assert said.startswith(f"error: rank {rank} on {socket.gethostname()} ")
    assert "step 4 is saved" in said and str(recipe) in said
    assert ("a mistake of its own" in said) == (deed == "fail")
    assert (f"not answered for {TIMEOUT} s" in said) == (deed == "stop")
    assert saved_steps(recipe.parent / "run") == [4]


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["kill", "fail", "stop"])
def test_the_others_name_the_one_that_reads_for_them(recipe: Path, deed: str) -> None:
    recipe.write_text(recipe.read_text().replace('use = "text"', 'use = "stream"'))
    first, second = ranks(recipe, deed, 9)  # the optimizer does nothing
    assert first.returncode == {"kill": -9, "stop": -9, "fail": 3}[deed]
    assert second.returncode == 75, second.stderr
    said = second.stderr.splitlines()[-1]
    assert said.startswith(f"error: rank 0 on {socket.gethostname()} ")
    assert ("a mistake of its own" in said) == (deed == "fail")


@pytest.mark.slow
def test_of_several_others_each_names_it_and_the_same_command_resumes(recipe: Path) -> None:
    done = ranks(recipe, "kill", 2, size=4)
    assert [one.returncode for one in done] == [75, 75, -9, 75]
    assert all("error: rank 2 on" in done[rank].stderr for rank in (0, 1, 3))
    done = ranks(recipe, "none", 2, size=4)
    assert {one.returncode for one in done} == {0}, done[0].stderr
    assert "step-00000004" in done[0].stdout
    assert saved_steps(recipe.parent / "run")[-1] == 12


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["sleep", "count"])
def test_one_that_is_busy_for_longer_is_waited_for(recipe: Path, deed: str) -> None:
    assert {one.returncode for one in ranks(recipe, deed, 1)} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_asked_to_stop_one_has_all_save(recipe: Path, rank: int) -> None:
    done = ranks(recipe, "ask", rank)
    assert {one.returncode for one in done} == {75}
    assert "--resume" in done[0].stdout
    assert saved_steps(recipe.parent / "run") == [4, 6]


@pytest.mark.slow
def test_asked_to_stop_before_the_first_step_one_ends_all(recipe: Path) -> None:
    done = ranks(recipe, "ask_at_once", 1)
    assert {one.returncode for one in done} == {75}
    assert "rank 1 on" in done[0].stderr and "no step is saved" in done[0].stderr


@pytest.mark.slow
def test_torchrun_lets_ranks_save_but_returns_1(recipe: Path) -> None:
    done = torchrun(recipe, "ask_launcher", 1)
    assert done.returncode == 1
    first, last = saved_steps(recipe.parent / "run")
    assert first == 4 and 6 <= last < 12  # torchrun may take a step to pass the signal on
    assert "--resume" in done.stdout


@pytest.mark.slow
def test_under_torchrun_a_killed_rank_is_named_and_all_can_start_again(recipe: Path) -> None:
    done = torchrun(recipe, "kill_once", 1, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert "error: rank 1 on" in done.stderr and "step 4 is saved" in done.stderr
    assert "step-00000004" in done.stdout and saved_steps(recipe.parent / "run")[-1] == 12
