"""Heartbeats of ranks, in one process: who is lost, who is not, and what each is told."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore, Store

from lswt_core.distributed.rank_monitor import RankMonitor, read_timeout
from lswt_core.distributed.rank_status import TORCHRUN, Peers, Status
from lswt_core.errors import Incompatible, NumericsError, Preempted, RankLost

pytestmark = pytest.mark.slow  # waits for time-outs

LOST_AFTER = 0.9  # seconds
SOON = 5 * LOST_AFTER


class Ranks:
    """Monitors on one store, and which of them were to end."""

    def __init__(self, size: int, store: Store | None = None) -> None:
        self.store, self.ended = store or HashStore(), dict[int, RankLost]()
        self.monitors = [self.monitor(rank, size) for rank in range(size)]

    def monitor(self, rank: int, size: int) -> RankMonitor:
        def end(error: RankLost) -> None:
            self.ended[rank] = error

        return RankMonitor(self.store, rank, size, LOST_AFTER, server=TORCHRUN, end=end)

    def start(self) -> Ranks:
        for monitor in self.monitors:
            monitor.start()
        for monitor in self.monitors:
            monitor.wait_for_all(SOON)
        return self

    def wait(self, *ranks: int) -> list[RankLost]:
        """The errors of ranks that were to end soon."""
        deadline = time.monotonic() + SOON
        while not set(ranks) <= set(self.ended) and time.monotonic() < deadline:
            time.sleep(0.02)
        return [self.ended[rank] for rank in ranks]


@pytest.fixture
def three() -> Iterator[Ranks]:
    ranks = Ranks(3).start()
    yield ranks
    for monitor in ranks.monitors:
        monitor.is_closed = True


def test_ranks_that_live_are_not_lost(three: Ranks) -> None:
    time.sleep(1.5 * LOST_AFTER)
    assert not three.ended and all(one.found is None for one in three.monitors)


def test_one_that_falls_silent_ends_the_others_by_name(
    three: Ranks, capfd: pytest.CaptureFixture[str]
) -> None:
    three.monitors[1].is_closed = True
    errors = three.wait(0, 2)
    assert [error.rank for error in errors] == [1, 1]
    assert {error.exit_code for error in errors} == {75}
    assert "error: rank 1 on " in capfd.readouterr().err


def test_one_that_ends_with_an_error_is_quoted(three: Ranks) -> None:
    three.monitors[2].leave(ValueError("too small\nby far"))
    for error in three.wait(0, 1):
        assert error.rank == 2 and error.reason.endswith("ended with: ValueError: too small")


def test_one_that_is_done_is_not_missed(three: Ranks) -> None:
    three.monitors[0].leave(None)
    time.sleep(1.5 * LOST_AFTER)
    assert not three.ended


def test_an_error_that_all_have_stays_what_it_is(three: Ranks) -> None:
    error = NumericsError("step 3 is not finite")
    for monitor in three.monitors:
        assert monitor.explain(error) is None
    three.monitors[0].leave(error)
    time.sleep(LOST_AFTER / 2)  # as the others write their reports
    assert not three.ended


def test_the_error_of_a_collective_is_explained_by_who_is_lost(three: Ranks) -> None:
    three.monitors[0].is_closed = True
    began = time.monotonic()
    with pytest.raises(RankLost) as raised, three.monitors[1].naming_lost_ranks():
        raise RuntimeError("Connection closed by peer")
    assert raised.value.rank == 0 and time.monotonic() < began + LOST_AFTER


def test_an_error_of_this_rank_alone_stays_what_it_is(three: Ranks) -> None:
    with pytest.raises(RuntimeError, match="of its own"), three.monitors[1].naming_lost_ranks():
        raise RuntimeError("of its own")


def test_who_is_lost_is_believed_of_one_that_knows(three: Ranks) -> None:
    three.monitors[0].leave(RankLost("rank 2 on b is gone", 2, "start again"))
    (error,) = three.wait(1)
    assert error.rank == 2 and error.reason == "rank 2 on b is gone"


def test_one_that_was_stopped_learns_that_the_others_went_on_without_it(three: Ranks) -> None:
    three.monitors[0].leave(RankLost("rank 1 on b has not answered", 1, "start again"))
    (error,) = three.wait(1)
    assert error.rank == 1 and error.reason.startswith("the other ranks have ended")


def test_ranks_that_save_and_stop_wait_for_one_another(three: Ranks) -> None:
    for monitor in three.monitors[1:]:
        monitor.own = monitor.own._replace(ended="stopped")
    began = time.monotonic()
    three.monitors[0].leave(Preempted("stopped"))
    assert time.monotonic() < began + LOST_AFTER / 2
    assert {status.ended for status in three.monitors[0].peers.known.values()} == {"stopped"}


def test_ranks_that_do_not_come_are_named() -> None:
    ranks = Ranks(4)
    for monitor in ranks.monitors[::2]:
        monitor.start()
    with pytest.raises(RankLost, match=r"of 4 processes.*: 1, 3"):
        ranks.monitors[0].wait_for_all(0.3)
    for monitor in ranks.monitors:
        monitor.is_closed = True


class Frozen(HashStore):
    """A store whose server is stopped after a while."""

    frozen = False

    def set(self, key: str, value: str) -> None:
        while self.frozen:
            time.sleep(0.05)
        super().set(key, value)


class Gone(HashStore):
    """A store whose server is killed after a while."""

    frozen = False

    def set(self, key: str, value: str) -> None:
        if self.frozen:
            raise RuntimeError("Connection was likely closed")
        super().set(key, value)


@pytest.mark.parametrize("kind", [Frozen, Gone])
@pytest.mark.parametrize("server", [0, TORCHRUN])
def test_the_loss_of_the_store_is_that_of_who_serves_it(
    kind: type[Frozen | Gone], server: int
) -> None:
    store = kind()
    ranks = Ranks(2, store).start()
    ranks.monitors[1].server = server
    ranks.monitors[0].is_closed = True
    store.frozen = True
    (error,) = ranks.wait(1)
    assert error.rank == server and ("torchrun" in error.reason) == (server == TORCHRUN)
    store.frozen = False
    ranks.monitors[1].is_closed = True


def test_time_in_which_nobody_was_asked_is_no_silence() -> None:
    peers = Peers(0)
    peers.update(1, Status("b", 7), 3600.0)
    assert peers.failure(60) is None
    peers.update(1, Status("b", 7), 4.0)
    assert peers.failure(60) is None
    peers.update(1, Status("b", 7), 56.0)
    assert peers.failure(60) is not None
    peers.update(1, Status("b", 8), 4.0)
    assert peers.failure(60) is None


@pytest.mark.parametrize("text", ["0", "-3", "nan", "inf", "soon", ""])
def test_a_timeout_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(Incompatible, match="LSWT_RANK_TIMEOUT"):
        read_timeout({"LSWT_RANK_TIMEOUT": text})
    assert read_timeout({}) == 60 and read_timeout({"LSWT_RANK_TIMEOUT": "12.5"}) == 12.5
