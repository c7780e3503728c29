"""How the ranks of a run find one another: a store that torchrun serves, or else rank 0; and how
one that ends before that tells the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from lswt_core.distributed.launch import read_launcher
from lswt_core.distributed.print_once import has_agent_store
from lswt_core.distributed.rank_monitor import JOIN_TIMEOUT, RankMonitor, read_timeout
from lswt_core.distributed.rank_status import TORCHRUN
from lswt_core.errors import Incompatible, RankLost

if TYPE_CHECKING:
    from torch.distributed import Store

# Of the time after which a rank is lost: how long one that has failed waits for those it did not
# meet.
EARLY_PART = 1 / 2
attempts: list[int] = []  # ranks that this process has tried to be


def meet(
    rank: int, size: int, environment: Mapping[str, str], patience: float = JOIN_TIMEOUT
) -> tuple[RankMonitor, Store]:
    """Connect to the store, which answers within ``patience`` seconds. Returns a monitor, started,
    and the store of the process group, each with a connection of its own: a request of one must not
    wait for the other's. Raises Incompatible if two processes are the same rank, and RankLost if
    the store does not answer.
    """
    from torch.distributed import PrefixStore

    attempts.append(rank)
    lost_after = read_timeout(environment)
    served = has_agent_store(environment)
    # torchrun's store outlives an attempt
    prefix = f"lswt/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = PrefixStore(prefix, open_store(environment, patience, serve=rank == 0 and not served))
    if store.add(f"processes/{rank}", 1) > 1:
        raise Incompatible(
            f"two processes are rank {rank} of {address(environment)}: another run was launched"
            " with the same MASTER_PORT, or RANK is not set for each process"
            "\n  fix: give every run a MASTER_PORT of its own"
        )
    monitor = RankMonitor(
        PrefixStore(prefix, open_store(environment, patience, serve=False)),
        rank,
        size,
        lost_after,
        server=TORCHRUN if served else 0,
    )
    monitor.start()
    return monitor, store


def announce_failure(error: BaseException) -> None:
    """Tell the ranks that wait for this process that it ends, if it has not tried to meet them.
    Does nothing under torchrun, which ends all when one has failed.
    """
    with suppress(Exception):  # the error itself is printed
        process = read_launcher(os.environ)
        if process.size == 1 or attempts or has_agent_store(os.environ):
            return
        patience = EARLY_PART * read_timeout(os.environ)
        monitor, _ = meet(process.rank, process.size, os.environ, patience)
        monitor.end_before_all_came(error, patience)


def open_store(environment: Mapping[str, str], patience: float, *, serve: bool) -> Store:
    """A connection to the store, which this process serves or waits for."""
    from torch.distributed import TCPStore

    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        timeout = timedelta(seconds=patience)
        return TCPStore(host, port, is_master=serve, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        where = address(environment)
        if serve:
            raise Incompatible(
                f"rank 0 cannot serve {where}: {str(error).partition(chr(10))[0]}"
                "\n  fix: give this run another MASTER_PORT, which nothing else listens on"
            ) from error
        reason = f"rank 0 has not answered at {where} for {patience:g} s"
        raise RankLost(reason, 0, "see what it printed, and start all processes again") from error


def address(environment: Mapping[str, str]) -> str:
    """Where the store is."""
    return f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
