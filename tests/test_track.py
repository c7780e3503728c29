"""metrics.jsonl survives being cut anywhere; trackers can do no harm."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

import pytest

from lswt_core.errors import PluginError, ResourceError
from lswt_core.interfaces import RunInfo, Tracker
from lswt_core.train.metrics import Metrics


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Fake(Tracker):
    """Remembers what it is told, after doing what it is built to do."""

    name = "fake"

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.act, self.seen, self.closed = act, [], False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.act()
        self.seen.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed = True


def test_lines_are_on_disk_when_log_returns_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.log(1, {"loss": 0.1 + 0.2, "grad_norm": math.inf, "tokens": 2**60 + 1})
    metrics.log(2, {"loss": math.nan})
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1 + 0.2, "grad_norm": None, "tokens": 2**60 + 1},
        {"step": 2, "loss": None},
    ]
    metrics.close()


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 2, "lo', b'{"step": 2}', b"\xff\xfe", b"\0\0\n", b"7\n"]
)
@pytest.mark.parametrize(
    ("resume_step", "kept"), [(None, []), (0, [0]), (2, [0, 1, 2, 2]), (9, [0, 1, 2, 2, 3])]
)
def test_a_resumed_file_has_every_step_once(
    tmp_path: Path, torn: bytes, resume_step: int | None, kept: list[int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    before = [
        b'{"step":  0, "eval/loss": 5}\n',
        b'{"step": 1}\n',
        b'{"step": 2}\n',
        b'{"step": 2, "eval/loss": 4}\n',
        b'{"step": 3}\n',
    ]
    path.write_bytes(b"".join(before) + torn)
    metrics = Metrics(path, resume_step=resume_step)
    metrics.log(10, {})
    metrics.close()
    assert path.read_bytes() == b"".join(before[: len(kept)]) + b'{"step": 10}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_is_written_to_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "null"
    path.symlink_to(os.devnull)
    metrics = Metrics(path, resume_step=3)
    metrics.log(4, {"loss": 1.0})
    metrics.close()
    assert path.is_symlink()


def test_trackers_get_every_entry_in_order(tmp_path: Path) -> None:
    first, second = Fake(), Fake()
    metrics = Metrics(tmp_path / "metrics.jsonl", [first, second])
    for step in range(50):
        metrics.log(step, {"loss": step / 2})
    metrics.close()
    assert first.seen == second.seen == [(step, {"loss": step / 2}) for step in range(50)]
    assert first.closed and second.closed


def test_a_tracker_that_raises_is_reported_once_and_dropped_alone(tmp_path: Path) -> None:
    def fail() -> None:
        raise ConnectionError("no route")

    notices: list[str] = []
    good = Fake()
    metrics = Metrics(tmp_path / "metrics.jsonl", [Fake(fail), good], notice=notices.append)
    for step in range(5):
        metrics.log(step, {"loss": 1.0})
    metrics.close()
    (notice,) = notices
    assert "'fake'" in notice and "ConnectionError: no route" in notice
    assert len(good.seen) == len(lines(tmp_path / "metrics.jsonl")) == 5


def test_a_tracker_that_hangs_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lswt_core.train.metrics.QUEUE_LENGTH", 3)
    monkeypatch.setattr("lswt_core.train.metrics.CLOSE_SECONDS", 0.2)
    release, notices = Event(), []
    metrics = Metrics(
        tmp_path / "metrics.jsonl", [Fake(lambda: release.wait(60) and None)], notice=notices.append
    )
    began = time.monotonic()
    for step in range(100):
        metrics.log(step, {"loss": 1.0})
    metrics.close()
    assert time.monotonic() - began < 5
    assert len(lines(tmp_path / "metrics.jsonl")) == 100
    lagging, unfinished = notices
    assert "from step" in lagging and "metrics.jsonl" in unfinished
    release.set()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    with Path("/dev/full").open("wb", buffering=0) as full:
        os.dup2(full.fileno(), metrics._file.fileno())
    with pytest.raises(ResourceError, match=r"metrics\.jsonl.*No space left"):
        metrics.log(1, {"loss": 1.0})
    metrics.close()


RECIPE = {"train": {"batch_size": 2, "seed": 0}, "loss": {"simctg": {"weight": 0.5}}}


@pytest.mark.parametrize(("module", "extra"), [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    for name in [
        name
        for name in sys.modules
        if name.split(".")[0] == module or name.startswith("torch.utils.tensorboard")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    (component,) = importlib.import_module(f"lswt_{module}").lswt_components()
    with pytest.raises(PluginError, match=rf"pip install 'lswt-core\[{extra}\]'"):
        component(RunInfo("trial", tmp_path, RECIPE))


def test_tensorboard_shows_a_resumed_run_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tensorboard,) = importlib.import_module("lswt_tensorboard").lswt_components()
    for steps, value in ((range(1, 6), 1.0), (range(4, 8), 2.0)):
        metrics = Metrics(
            tmp_path / "metrics.jsonl",
            [tensorboard(RunInfo("trial", tmp_path, RECIPE))],
            resume_step=steps.start - 1,
        )
        for step in steps:
            metrics.log(step, {"loss": value})
        metrics.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (n, 1.0 if n < 4 else 2.0) for n in range(1, 8)
    ]


WANDB_RUN = """
import socket, sys
from pathlib import Path
def refuse(event, arguments):
    if event != "socket.connect" or arguments[0].family == socket.AF_UNIX:
        return
    if arguments[1][0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError("no network: " + str(arguments[1]))
sys.addaudithook(refuse)
from lswt_core.interfaces import RunInfo
from lswt_core.train.metrics import Metrics
from lswt_wandb import Wandb
notices = []
directory = Path(sys.argv[1])
run = RunInfo("trial", directory, {"train": {"batch_size": 2}})
mirrors = [Wandb(run, tags=["a", "b"])]
metrics = Metrics(directory / "metrics.jsonl", mirrors, resume_step=0, notice=notices.append)
for step in range(1, 4):
    metrics.log(step, {"loss": 1.0 / step})
metrics.close()
print(notices)
"""


@pytest.mark.slow
def test_wandb_runs_offline_without_network_and_key_and_keeps_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB")
    }
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", WANDB_RUN, tmp_path],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
        time.sleep(1.1)  # wandb names its directories by the second
    identity = (tmp_path / "wandb_id").read_text().strip()
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(runs) == 2
    assert all(b"loss" in run.read_bytes() for run in runs)
