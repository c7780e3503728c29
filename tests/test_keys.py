"""Under what the runs of ablations are kept: whatever changes a run's numbers changes its key, and
nothing else does; and several processes share the store.
"""

from __future__ import annotations

import errno
import importlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from nano import NANO

from lswt_core.ablation.runs.imported_code import record_imports
from lswt_core.ablation.runs.outcome import Outcome
from lswt_core.ablation.runs.progress import Job
from lswt_core.ablation.runs.runner import Runner, Workers
from lswt_core.ablation.runs.store import WORKER_LOCK, CacheKeys, RunStore, write_json
from lswt_core.ablation.runs.surroundings import Surroundings, name_of_all
from lswt_core.ablation.runs.worker import require_same_code
from lswt_core.checkpoint import RunLock, lock
from lswt_core.errors import BusyError, CheckpointError, UsageError
from lswt_core.model.attention_choice import choose_backends
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

RECIPE = (
    NANO + '[tokenizer]\nuse = "own-bytes"\n[ffn]\nuse = "own"\n[train]\nbatch_size = 2\nseq_len ='
    " 16\nsteps = 2\n"
)
METADATA = "site-packages/library-1.0.dist-info/METADATA"
FILES = {
    "plugin.py": (
        """
from pathlib import Path
import beside
from elsewhere.parents import Parent
from lswt_bytes import Bytes
from lswt_core.hooks import hookimpl
from lswt_eager import Eager

class Own(Parent):
    name = "own"

    def __init__(self, dims, *, notes: str = "notes.txt"):
        super().__init__(dims)
        self.table = "table.txt"

    def forward(self, x):
        import late
        return super().forward(x) * beside.SCALE

class Backend(Eager):
    name = "own-attention"

class OwnBytes(Bytes):
    name = "own-bytes"

    def fit(self, documents, fingerprint, cache):
        self.words = Path("words.txt").read_text()

    def fingerprint(self):
        return self.words

@hookimpl
def lswt_components():
    return [Own, Backend, OwnBytes]
"""
    ),
    "beside.py": "from further import SCALE\nimport library\n",
    "further.py": "SCALE = 1.0\n",
    "late.py": "",
    "unused.py": "",
    "words.txt": "a b",
    "table.txt": "1 2",
    "notes.txt": "x",
    "unnamed.txt": "y",
    "hidden.py": "SCALE = 1.0\n",
    "site-packages/elsewhere/__init__.py": "",
    "site-packages/elsewhere/parents.py": (
        "from lswt_swiglu import SwiGlu\n\nclass Parent(SwiGlu):\n    name = 'parent'\n"
    ),
    "site-packages/library/__init__.py": "",
    METADATA: "Metadata-Version: 2.1\nName: library\nVersion: 1.0\n",
    "site-packages/library-1.0.dist-info/top_level.txt": "library\n",
    "site-packages/library-1.0.dist-info/RECORD": "library/__init__.py,sha256=abc,0\n",
}
MODULES = ("hidden", "beside", "further", "late", "library", "elsewhere", "elsewhere.parents")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a recipe, a text, word embeddings, and a plugin that imports from it and
    from what is installed.
    """
    for name, text in FILES.items():
        tmp_path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        # a module of its own
        tmp_path.joinpath(name).write_text(
            text + (f"# {tmp_path}\n" if name == "plugin.py" else "")
        )
    tmp_path.joinpath("corpus.txt").write_text("".join(random.Random(0).choices("abc ", k=500)))
    tmp_path.joinpath("nano.toml").write_text(RECIPE.format(corpus=tmp_path / "corpus.txt"))
    save(tmp_path, 0.0)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(place: Path, value: float) -> None:
    numpy.savez(place / "table.npz", table=numpy.full((320, 24), value, dtype=numpy.float32))


def key(place: Path, *overrides: str, backend: str = "blocked") -> str:
    registry = Registry(files=[place / "plugin.py"])
    recipe = Recipe.load(
        place / "nano.toml", ["embedding.warm_start=table.npz", *overrides], registry=registry
    )
    surroundings = Surroundings.here(torch.device("cpu"), 1)
    return CacheKeys(registry, surroundings).of(recipe, [backend])


def append(name: str, text: str = "# edited\n") -> Callable[[Path], object]:
    return lambda place: place.joinpath(name).write_text((place / name).read_text() + text)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(append("plugin.py"), id="the plugin"),
        pytest.param(append("beside.py"), id="a module it imports"),
        pytest.param(append("further.py"), id="a module that this one imports"),
        pytest.param(append("late.py"), id="a module that is imported in a function"),
        pytest.param(
            append("site-packages/elsewhere/parents.py"), id="a parent class of another package"
        ),
        pytest.param(
            lambda place: place.joinpath(METADATA).write_text(
                FILES[METADATA].replace("1.0", "1.1")
            ),
            id="a version",
        ),
        pytest.param(
            append("site-packages/library-1.0.dist-info/RECORD", "library/a.py,sha256=d,1\n"),
            id="a build of one version",
        ),
        pytest.param(lambda place: save(place, 1.0), id="the word embeddings of a warm start"),
        pytest.param(
            lambda place: place.joinpath("corpus.txt").write_text("another text " * 40),
            id="the text",
        ),
        pytest.param(append("words.txt", " c"), id="a file of the tokenizer"),
        pytest.param(append("table.txt", " 3"), id="a file that the plugin names"),
        pytest.param(append("notes.txt", "z"), id="a file that an option names"),
    ],
)
def test_what_changes_a_run_changes_its_key(place: Path, change: Callable[[Path], object]) -> None:
    before = key(place)
    assert key(place) == before
    change(place)
    assert key(place) != before


def test_what_a_run_does_not_use_leaves_its_key(place: Path) -> None:
    before = key(place)
    append("unused.py")(place)
    append("unnamed.txt", "z")(place)
    # an installed library is told by its distribution
    append("site-packages/library/__init__.py")(place)
    assert key(place) == before


def test_the_kernel_behind_auto_is_part_of_the_key(place: Path) -> None:
    assert (
        Recipe.load(place / "nano.toml", registry=Registry(files=[place / "plugin.py"]))
        .one("attention")
        .name
        == "auto"
    )
    assert key(place) != key(place, backend="sdpa")
    own = key(place, backend="own-attention")
    append("plugin.py", "Backend.offset = 1\n")(place)
    assert key(place, backend="own-attention") != own


# ---------- machine and environment


@pytest.mark.parametrize(
    "variable",
    [
        "ATEN_CPU_CAPABILITY",
        "CUBLAS_WORKSPACE_CONFIG",
        "KMP_DETERMINISTIC_REDUCTION",
        "LD_PRELOAD",
        "LSWT_ANYTHING",
        "MKL_CBWR",
        "MKL_NUM_THREADS",
        "NVIDIA_TF32_OVERRIDE",
        "OMP_DYNAMIC",
        "ONEDNN_MAX_CPU_ISA",
        "OPENBLAS_CORETYPE",
        "PYTORCH_ENABLE_MPS_FALLBACK",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
        "TORCHINDUCTOR_MAX_AUTOTUNE",
        "TRITON_F32_DEFAULT",
    ],
)
def test_a_variable_that_changes_numbers_changes_the_key(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Surroundings.here(torch.device("cpu"), 1)
    monkeypatch.setenv(variable, "1")
    once = Surroundings.here(torch.device("cpu"), 1)
    monkeypatch.setenv(variable, "2")
    assert len({before, once, Surroundings.here(torch.device("cpu"), 1)}) == 3


@pytest.mark.parametrize(
    "variable",
    ["PYTHONPATH", "HOME", "TERM", "LSWT_CACHE_DIR", "OMP_NUM_THREADS", "TORCH_LOGS", "TMPDIR"],
)
def test_a_variable_without_effect_leaves_the_key(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Surroundings.here(torch.device("cpu"), 1)
    monkeypatch.setenv(variable, "2")
    assert Surroundings.here(torch.device("cpu"), 1) == before
    assert Surroundings.here(torch.device("cpu"), 2) != before, "threads are sums of other order"


def test_accelerators_of_one_study_are_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "AAB"[number])
    assert name_of_all(["0", "1"]) == "A"
    with pytest.raises(UsageError, match="2 is B"):
        name_of_all(["0", "2"])


# ---------- what no analysis of the source finds


def test_what_a_process_imported_by_a_made_up_name_is_remembered(place: Path) -> None:
    with place.joinpath("plugin.py").open("a") as file:
        file.write("import importlib\nSCALE = importlib.import_module('hid' + 'den').SCALE\n")
    store, before = RunStore(place / "store"), key(place)
    registry = Registry(files=[place / "plugin.py"])
    recipe = Recipe.load(place / "nano.toml", registry=registry)
    importlib.import_module("hidden")
    record_imports(store.directory(before), recipe, registry)
    recorded = store.imports(before)
    assert str(place / "hidden.py") in recorded["files"]
    assert str(place / "beside.py") not in recorded["files"], "the key covers it"
    assert "torch" not in recorded["libraries"] and "pytest" in recorded["libraries"]
    assert store.current(before) == before
    append("hidden.py")(place)
    assert key(place) == before, "otherwise this test shows nothing"
    assert store.current(before) != before
    place.joinpath("hidden.py").write_text(FILES["hidden.py"])
    assert store.current(before) == before, "and it is found again"
    recorded["libraries"]["pytest"] = ["0.1", ""]
    write_json(store.directory(before) / "imports.json", recorded)
    assert store.current(before) != before


def test_code_that_is_edited_while_a_study_runs_is_refused(place: Path) -> None:
    registry = Registry(files=[place / "plugin.py"])
    recipe = Recipe.load(place / "nano.toml", registry=registry)
    backends = choose_backends(recipe, registry, torch.device("cpu"), torch.float32).names
    code = CacheKeys(registry, Surroundings("cpu", 1)).code_of(recipe, backends)
    require_same_code(recipe, registry, code)
    append("further.py")(place)
    with pytest.raises(CheckpointError, match="since the study began"):
        require_same_code(recipe, registry, code)


# ---------- several processes


def refuse(number: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_directory_is_held_where_the_file_system_has_no_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.FCNTL, "flock", refuse(number))
    with RunLock(tmp_path), pytest.raises(BusyError, match=r"lock\.held"), RunLock(tmp_path):
        pass
    held = tmp_path / "lock.held"
    assert not held.exists()
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    held.write_text(f"process {ended.pid} on {socket.gethostname()}\n")
    with RunLock(tmp_path), pytest.raises(BusyError), RunLock(tmp_path):
        pass
    held.write_text(f"process {ended.pid} on another-machine\n")
    with pytest.raises(BusyError, match="If it is gone"), RunLock(tmp_path):
        pass
    assert held.exists()


def test_other_errors_of_a_lock_are_not_taken_for_its_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock.FCNTL, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="error"), RunLock(tmp_path):
        pass


class Ended:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


def one_run(
    place: Path, launch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Outcome, list[str]]:
    """The outcome of one run whose process is given, and what was printed."""
    lines: list[str] = []
    monkeypatch.setattr(Runner, "launch", launch)
    monkeypatch.setattr("lswt_core.ablation.runs.runner.RETRY", 0.0)
    job = Job("baseline", 0, "a", Recipe.from_dict({"train": {"steps": 1}}))
    workers = Workers(1, 1, [], [])
    return Runner([job], RunStore(place), workers, lines.append).run()["a"], lines


def test_a_run_that_another_study_makes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RunLock(tmp_path / "a", WORKER_LOCK)
    other.__enter__()

    def end_other(*_: object) -> None:
        write_json(tmp_path / "a" / "outcome.json", Outcome(0, loss=3.0).to_json())
        other.__exit__(None, None, None)

    monkeypatch.setattr("time.sleep", end_other)
    outcome, lines = one_run(tmp_path, refuse(errno.EIO), monkeypatch)
    assert outcome.loss == 3.0 and "in use by another process" in lines[0]
    assert "found" in lines[1] and len(lines) == 2


def test_the_outcome_of_an_earlier_try_is_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    old = Outcome.failed(0, "memory or disk: full")
    write_json(tmp_path / "a" / "outcome.json", old.to_json())
    kept = []

    def launch(runner: Runner, recipe: Path, directory: Path, *_: str) -> Ended:
        kept.append((directory / "outcome.json").is_file())
        return Ended(-11)

    assert one_run(tmp_path, launch, monkeypatch)[0].failure == "killed by signal 11"
    assert kept == [True], "nobody who reads it loses it before the run is locked"
    outcome, _ = one_run(tmp_path, refuse(errno.EAGAIN), monkeypatch)
    assert outcome.failure is not None and "could not be started" in outcome.failure
