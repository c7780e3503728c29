"""Errors of several ranks under torchrun: what all would say alike, one says; nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import Store, TCPStore

from lswt_core.__main__ import main as all_commands
from lswt_core.distributed import print_once
from lswt_core.run import main

Rank = Callable[..., tuple[int, str]]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store that torchrun serves to its ranks."""
    served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(served.port),
        "WORLD_SIZE": "4",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return served


@pytest.fixture
def run_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Rank:
    """Start a run in this process as one of several ranks: its exit code, and what it printed."""

    def run_rank(rank: int, recipe: str = "train.stesp=1", **environment: str) -> tuple[int, str]:
        for name, value in {"RANK": str(rank), **environment}.items():
            monkeypatch.setenv(name, value)
        code = main(["quickstart", recipe, "--out", str(tmp_path / "run")])
        captured = capsys.readouterr()
        assert not captured.out
        return code, captured.err

    return run_rank


@pytest.mark.usefixtures("store")
def test_an_error_of_all_ranks_is_printed_once(run_rank: Rank) -> None:
    codes, printed = zip(*map(run_rank, range(4)), strict=True)
    assert set(codes) == {2}
    assert printed[0].startswith("error:") and printed[1:] == ("", "", "")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("command", [main, lambda words: all_commands(["run", *words])])
def test_a_usage_error_is_printed_once(
    command: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit) as left:
            command(["quickstart", "--nonsense"])
        assert left.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("--nonsense") == printed.count("usage:") == 1


@pytest.mark.usefixtures("store")
def test_an_error_of_one_rank_is_printed_by_that_rank(run_rank: Rank) -> None:
    assert run_rank(0)[0] == 2
    code, printed = run_rank(3, "train.steps=none")
    assert code == 2 and printed.startswith("error:")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("another", ["TORCHELASTIC_RESTART_COUNT", "GROUP_RANK"])
def test_every_attempt_and_every_machine_prints_it(run_rank: Rank, another: str) -> None:
    first, second = run_rank(0), run_rank(0, **{another: "1"})
    assert first == second and first[1]


@pytest.mark.usefixtures("store")
def test_a_rank_that_ends_before_it_has_printed_costs_nothing(
    run_rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(print_once, "PRINT_TIMEOUT", timedelta(milliseconds=50))
    with monkeypatch.context() as patch:
        patch.setattr(print_once, "mark_printed", lambda *about: None)
        run_rank(0)
    assert run_rank(1)[1].startswith("error:")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("port", ["1", "none"])
def test_without_an_answer_every_rank_prints(
    run_rank: Rank, monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    monkeypatch.setattr(print_once, "CONNECT_TIMEOUT", timedelta(milliseconds=50))
    assert all(run_rank(rank, MASTER_PORT=port)[1].startswith("error:") for rank in (0, 1))


@pytest.mark.usefixtures("store")
def test_sigterm_waits_for_the_error(run_rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(store: Store, key: str) -> bool:
        signal.raise_signal(signal.SIGTERM)
        return False

    monkeypatch.setattr(print_once, "is_printed_elsewhere", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert run_rank(0)[1].startswith("error:")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_single_process_asks_nobody(run_rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(print_once, "connect", lambda environment: pytest.fail("it asked"))
    assert all(run_rank(0)[1].startswith("error:") for _ in range(2))
