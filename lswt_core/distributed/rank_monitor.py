"""A rank's heartbeat, and its watch over the other ranks: a rank that is lost ends all, wherever
they wait for it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from lswt_core.distributed.print_once import print_once
from lswt_core.distributed.rank_status import TORCHRUN, Failure, Peers, Status, silence
from lswt_core.errors import Incompatible, LswtError, Preempted, RankLost

if TYPE_CHECKING:
    from torch.distributed import Store

TIMEOUT_VARIABLE = "LSWT_RANK_TIMEOUT"
JOIN_TIMEOUT = 300.0  # seconds until all ranks are there; importing may be slow
JOIN_PAUSE = 0.05  # seconds between two looks whether all are there
LOST_AFTER = 60.0  # seconds without a heartbeat, after which a rank is lost
# parts of that time
BEAT_PART = 1 / 30  # between two heartbeats
# without a heartbeat, where a collective has failed and only the culprit's name is sought
NAMED_PART = 1 / 10
# for a rank to end by itself, once it is known that the run is over
GRACE_PART = 1 / 6
LONGEST_REASON = 300  # characters of another rank's error


def read_timeout(environment: Mapping[str, str]) -> float:
    """LOST_AFTER, or what the environment says instead. Raises Incompatible."""
    text = environment.get(TIMEOUT_VARIABLE, str(LOST_AFTER))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < float("inf"):
        raise Incompatible(f"{TIMEOUT_VARIABLE} = {text!r} is no number of seconds from 1")
    return seconds


def end_process(error: RankLost) -> None:
    """End this process although its main thread waits in a collective."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(error.exit_code)


def no_advice() -> str:
    """What to do, where nothing is known of the run."""
    return "the same command starts or resumes the run"


class RankMonitor:
    """Tells the other ranks that this one lives, and ends this one when another is lost.

    One thread exchanges heartbeats through the store, another watches it: the store's server may
    be stopped as well, and a request to it then never returns. The main thread may compile,
    tokenise or write for as long as it likes.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        lost_after: float,
        *,
        server: int = 0,
        end: Callable[[RankLost], None] = end_process,
    ) -> None:
        """``server``: the rank in whose process the store is served, or TORCHRUN. ``end`` is
        called with the lost rank from another thread, and is not to return.
        """
        self.store, self.rank, self.size, self.server, self.end = store, rank, size, server, end
        self.lost_after, self.interval = lost_after, lost_after * BEAT_PART
        self.named_after, self.grace = lost_after * NAMED_PART, lost_after * GRACE_PART
        self.advice: Callable[[], str] = no_advice  # what is saved, and what to do
        self.own, self.peers = Status(socket.gethostname()), Peers(rank)
        self.told: Status | None = None  # what the others can know of this rank
        self.unanswered = 0.0  # seconds since the store answered
        self.disconnected = False  # by the store
        self.is_leaving = self.is_closed = False
        self.found: Failure | None = None  # the first
        self.changed = threading.Condition()

    def start(self) -> None:
        """Start both threads."""
        for work in (self.beat, self.watch):
            threading.Thread(target=work, name=f"lswt-rank-{work.__name__}", daemon=True).start()

    # ---------- the threads

    def beat(self) -> None:
        """Exchange heartbeats until the monitor is closed or the store is gone."""
        asked = time.monotonic()
        while not self.is_closed:
            now = time.monotonic()
            # this process may have been stopped itself, and the others with it
            elapsed, asked = min(now - asked, 2 * self.interval), now
            try:
                self.exchange(elapsed)
            except RuntimeError:
                with self.changed:
                    self.disconnected = True
                    self.changed.notify_all()
                return
            with self.changed:
                are_all_known = len(self.peers.known) == self.size - 1
                pause = self.interval if are_all_known else min(self.interval, JOIN_PAUSE)
                self.changed.wait_for(self.has_news, timeout=pause)

    def has_news(self) -> bool:
        """Whether this rank has something to tell at once."""
        told = None if self.told is None else self.told.ended
        return self.is_closed or told != self.own.ended

    def exchange(self, elapsed: float) -> None:
        """Tell how this rank is, and read how the others are."""
        with self.changed:
            own = self.own = self.own._replace(beats=self.own.beats + 1)
        self.store.set(key_of(self.rank), json.dumps(own))
        others = [rank for rank in range(self.size) if rank != self.rank and self.is_known(rank)]
        texts = self.store.multi_get([key_of(rank) for rank in others]) if others else []
        with self.changed:
            self.told, self.unanswered = own, 0.0
            for rank, text in zip(others, texts, strict=True):
                self.peers.update(rank, Status(*json.loads(text)), elapsed)
            self.changed.notify_all()

    def is_known(self, rank: int) -> bool:
        """Whether a rank has told anything yet."""
        return rank in self.peers.known or self.store.check([key_of(rank)])

    def watch(self) -> None:
        """End this process when another rank is lost and the main thread does not notice."""
        while not self.is_closed:
            time.sleep(self.interval)
            with self.changed:
                self.unanswered += self.interval
                failure = self.failure(self.lost_after)
            if failure is None or self.is_leaving:
                continue
            time.sleep(self.grace)
            if not self.is_leaving and not self.is_closed:
                error = self.error(failure)
                print_once(f"error: {error}")
                self.leave(error)
                self.end(error)

    # ---------- what is known

    def failure(self, limit: float) -> Failure | None:
        """Why the run cannot go on; None if it can. The first that was found stays."""
        if self.found is None:
            self.found = self.peers.failure(limit) or self.lost_server(limit)
        return self.found

    def lost_server(self, limit: float) -> Failure | None:
        """The loss of the process that serves the store."""
        who = "torchrun, which started this process,"
        if self.server != TORCHRUN:
            server = self.peers.known.get(self.server)
            if self.server == self.rank or (server is not None and server.ended is not None):
                return None
            who = f"rank {self.server}" + (f" on {server.host}" if server is not None else "")
        if self.disconnected:
            return Failure(self.server, f"{who} is gone: its connection is closed")
        if self.unanswered > limit:
            return Failure(self.server, silence(who, limit))
        return None

    def error(self, failure: Failure) -> RankLost:
        """A failure as an error of this rank."""
        return RankLost(failure.text, failure.rank, self.advice())

    # ---------- the main thread

    def wait_for_all(self, timeout: float = JOIN_TIMEOUT) -> None:
        """Wait until every rank has told how it is. Raises RankLost if one ends first, or does not
        come.
        """
        with self.changed:
            self.changed.wait_for(
                lambda: self.failure(self.lost_after) or len(self.peers.known) == self.size - 1,
                timeout=timeout,
            )
            missing = set(range(self.size)) - {self.rank, *self.peers.known}
        if self.found is not None:
            raise self.error(self.found)
        if missing:
            names = ", ".join(map(str, sorted(missing)))
            reason = f"of {self.size} processes, these ranks did not come in {timeout:g} s: {names}"
            raise RankLost(reason, min(missing), self.advice())

    def end_before_all_came(self, error: BaseException, patience: float) -> None:
        """``leave``; where this process serves the store, after every other rank has come and can
        be told, or after so many seconds.
        """
        with self.changed:
            self.own = self.own._replace(ended=reason_of(error))
            self.changed.notify_all()
            if self.server == self.rank:
                self.changed.wait_for(
                    lambda: len(self.peers.known) == self.size - 1, timeout=patience
                )
        self.leave(error)

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Raise RankLost in place of an error of the block that the loss of another rank explains,
        such as that of a collective.
        """
        try:
            yield
        except BaseException as error:
            lost = self.explain(error)
            if lost is None:
                raise
            raise lost from error

    def explain(self, error: BaseException) -> RankLost | None:
        """The loss of a rank that explains an error; None if all others live."""
        with self.changed:
            self.is_leaving = True  # and is not to be ended by the other thread
            # torch has no type for the error of a collective: gloo's is a RuntimeError
            if not isinstance(error, RankLost) and has_runtime_error(error):
                self.changed.wait_for(
                    lambda: self.failure(self.named_after), timeout=2 * self.named_after
                )
                if self.found is not None:
                    return self.error(self.found)
        return None

    def leave(self, error: BaseException | None) -> None:
        """Tell the others that this rank ends, and how. Waits a moment for them if they could not
        be told otherwise.
        """
        with self.changed:
            self.is_leaving = True
            lost = error.rank if isinstance(error, RankLost) else None
            self.own = self.own._replace(ended=reason_of(error), lost=lost)
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: self.disconnected or not self.has_news(), timeout=self.grace
            )
            # torchrun ends all as soon as the first has stopped
            if self.server == self.rank or isinstance(error, Preempted):
                self.changed.wait_for(self.have_all_ended, timeout=self.grace)
            self.is_closed = True
            self.changed.notify_all()

    def have_all_ended(self) -> bool:
        """Whether no other rank needs this one's store any more."""
        ended = [rank for rank, status in self.peers.known.items() if status.ended is not None]
        lost = self.found is not None and self.found.rank not in ended
        return self.disconnected or len(ended) + lost >= len(self.peers.known)


def key_of(rank: int) -> str:
    """A rank's key in the store."""
    return f"status/{rank}"


def has_runtime_error(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is a RuntimeError."""
    while error is not None:
        if isinstance(error, RuntimeError):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def reason_of(error: BaseException | None) -> str:
    """How a rank ended, in a line for the others."""
    if error is None:
        return ""
    if isinstance(error, RankLost):
        return error.reason
    line = str(error).strip().partition("\n")[0]
    if not isinstance(error, LswtError):
        line = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return line[:LONGEST_REASON]
