"""A process of a run is killed, stopped, asked to stop or ends with an error: the others say which,
end soon, and lose nothing that is saved.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import Done
from ranks import run_ranks
from runs import saved_steps, surroundings, write_recipe

TIMEOUT = 5  # seconds until a rank is lost
# of what happens after the sixth of twelve updates, in one rank
DEED = '''
import os, signal, subprocess
from lswt_adamw import AdamW
from lswt_core.hooks import hookimpl


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("a mistake of its own")


def stop():
    subprocess.Popen(["sh", "-c", f"sleep 30; kill -9 {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def ask():
    os.kill(os.getpid(), signal.SIGTERM)


def ask_launcher():
    os.kill(os.getppid(), signal.SIGTERM)


def wait():
    import time
    time.sleep(2 * float(os.environ["LSWT_RANK_TIMEOUT"]))


class Doing(AdamW):
    "AdamW, after whose sixth update something happens."

    name = "doing"
    steps = 0

    def step(self, closure=None):
        super().step(closure)
        if self.param_groups[0]["params"][0].is_meta:
            return
        self.steps += 1
        if self.steps == 6 and os.environ["RANK"] == os.environ["DEED_OF"]:
            globals()[os.environ["DEED"]]()


@hookimpl
def lswt_components():
    return [Doing]
'''


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


def torchrun(recipe: Path, deed: str, rank: int) -> Done:
    """The same under torchrun."""
    told = settings(recipe, deed, rank)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
        + ["0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", *words(recipe)],
        cwd=recipe.parent,
        env=surroundings(recipe) | {name: str(value) for name, value in told.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )


def resume(recipe: Path) -> None:
    """The same command goes on where the run was."""
    for done in ranks(recipe, "fail", -1):
        assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing from" in ranks(recipe, "fail", -1)[0].stdout or True
    assert saved_steps(recipe.parent / "run")[-1] == 12


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("deed", ["kill", "fail", "stop"])
def test_without_an_agent(recipe: Path, deed: str, rank: int) -> None:
    began = time.monotonic()
    done = ranks(recipe, deed, rank)
    print(deed, rank, time.monotonic() - began)
    codes = [one.returncode for one in done]
    assert codes[1 - rank] == 75, done[1 - rank].stderr
    assert codes[rank] == {"kill": -9, "stop": -9, "fail": 3}[deed]
    print(done[1-rank].stderr)
    said = done[1 - rank].stderr.splitlines()[-1]
    assert said.startswith(f"error: rank {rank}") and "step 4 is saved" in said
    assert ("a mistake of its own" in said) == (deed == "fail")
    assert saved_steps(recipe.parent / "run") == [4]
