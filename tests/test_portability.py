"""Modules that are not there on every system (Windows) are not needed to import this package."""

from __future__ import annotations

import importlib.util
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import ROOT

from lswt_core.ablation.runs import (
    recorded_session,  # before anything is missing: what it imports stays as it is
)
from lswt_core.errors import BusyError

UNIX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without the modules that Unix alone has."""
    for name in UNIX_ONLY:
        monkeypatch.setitem(sys.modules, name, None)


def load(path: str) -> ModuleType:
    """A fresh copy of a module of the core."""
    spec = importlib.util.spec_from_file_location("a_fresh_copy", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unix_imports() -> set[str]:
    """The files of the core and the plugins that name one of these modules in an import."""
    importers = set()
    for folder in ("lswt_core", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            words = pairwise(path.read_text(encoding="utf-8").split())
            if any(word in ("import", "from") and name in UNIX_ONLY for word, name in words):
                importers.add(str(path.relative_to(ROOT)))
    return importers


@pytest.mark.usefixtures("elsewhere")
def test_every_module_that_names_one_is_imported_without_it() -> None:
    paths = unix_imports()
    assert str(Path(recorded_session.__file__).relative_to(ROOT)) in paths
    for path in paths:
        load(path)


@pytest.mark.usefixtures("elsewhere")
def test_a_run_directory_without_file_locks_is_used_with_a_warning(tmp_path: Path) -> None:
    lock = load("lswt_core/checkpoint/lock.py")
    with pytest.warns(UserWarning, match="locks"), lock.RunLock(tmp_path):
        pass


@pytest.mark.usefixtures("elsewhere")
def test_windows_locks_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: set[int] = set()

    def locking(descriptor: int, mode: int, size: int) -> None:
        if held:
            raise PermissionError
        held.add(descriptor)

    windows = ModuleType("msvcrt")
    windows.locking, windows.LK_NBLCK = locking, 2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    lock = load("lswt_core/checkpoint/lock.py")
    with lock.RunLock(tmp_path), pytest.raises(BusyError, match="process"):
        lock.RunLock(tmp_path).__enter__()


@pytest.mark.usefixtures("elsewhere")
def test_peak_memory_is_unknown_where_the_system_does_not_tell() -> None:
    measured = load("lswt_core/ablation/runs/recorded_session.py")
    assert measured.peak_memory(torch.device("cpu")) is None


def test_signals_that_a_system_lacks_are_not_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [one for one in signal.Signals if one.name != "SIGHUP"]
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(signal, "Signals", kept)
    with load("lswt_core/train/signals.py").StopRequest().listening() as stop:
        assert not stop()
