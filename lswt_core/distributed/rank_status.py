"""How the ranks of a run are, as each tells all others, and what one rank concludes from it."""

from __future__ import annotations

from typing import NamedTuple

TORCHRUN = -1  # in place of a rank: the process that serves the store


class Status(NamedTuple):
    """What a rank tells the others about itself, again and again."""

    host: str
    beats: int = 0  # how often it has told
    # how it ended, "" if it was done; None: it runs
    ended: str | None = None
    lost: int | None = None  # the rank whose loss made it end


class Failure(NamedTuple):
    """Why a rank's run cannot go on: a rank, and what is known of it."""

    rank: int
    text: str


class Peers:
    """The other ranks, as one rank knows them."""

    def __init__(self, rank: int) -> None:
        self.rank = rank  # whose knowledge this is
        self.known: dict[int, Status] = {}
        self.silent: dict[int, float] = {}  # seconds in which each has told nothing new

    def update(self, rank: int, status: Status, seconds: float) -> None:
        """Take note of what a rank tells, ``seconds`` after it was asked the last time."""
        is_new = self.known.get(rank) != status
        self.known[rank] = status
        self.silent[rank] = 0.0 if is_new else self.silent[rank] + seconds

    def failure(self, limit: float) -> Failure | None:
        """Why the run cannot go on; None if it can. A rank is lost that has told nothing new for
        ``limit`` seconds. What a rank itself told comes first, then what is seen, then hearsay.
        """
        return self.ended_by_itself() or self.silent_rank(limit) or self.named_by_another()

    def ended_by_itself(self) -> Failure | None:
        """A rank that ended with an error of its own."""
        for rank, status in sorted(self.known.items()):
            if status.ended and status.lost is None:
                return Failure(rank, f"rank {rank} on {status.host} ended with: {status.ended}")
        return None

    def silent_rank(self, limit: float) -> Failure | None:
        """The rank that has been silent for longest, if that is too long."""
        running = [rank for rank, status in self.known.items() if status.ended is None]
        rank = max(running, key=self.silent.__getitem__, default=self.rank)
        if self.silent.get(rank, 0.0) < limit:
            return None
        return Failure(rank, silence(f"rank {rank} on {self.known[rank].host}", limit))

    def named_by_another(self) -> Failure | None:
        """The rank because of which another rank has ended."""
        for _, status in sorted(self.known.items()):
            if status.ended and status.lost == self.rank:
                return Failure(self.rank, f"the other ranks have ended: {status.ended}")
            if status.ended and status.lost is not None:
                return Failure(status.lost, status.ended)
        return None


def silence(who: str, seconds: float) -> str:
    """The words for a process that does not answer."""
    return (
        f"{who} has not answered for {seconds:g} s: it was killed or stopped, or its machine or"
        " network is down"
    )
