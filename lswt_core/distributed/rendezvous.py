"""How the ranks of a run find one another: a store that torchrun serves, or else rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from lswt_core.distributed.print_once import has_agent_store
from lswt_core.distributed.rank_monitor import JOIN_TIMEOUT, RankMonitor, read_timeout
from lswt_core.distributed.rank_status import TORCHRUN
from lswt_core.errors import Incompatible, RankLost

if TYPE_CHECKING:
    from torch.distributed import Store


def meet(rank: int, size: int, environment: Mapping[str, str]) -> tuple[RankMonitor, Store]:
    """Connect to the store. Returns a monitor, started, and the store of the process group, each
    with a connection of its own: a request of one must not wait for the other's. Raises
    Incompatible if two processes are the same rank, and RankLost if the store does not answer.
    """
    from torch.distributed import PrefixStore

    lost_after = read_timeout(environment)
    served = has_agent_store(environment)
    # torchrun's store outlives an attempt
    prefix = f"lswt/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = PrefixStore(prefix, open_store(environment, serve=rank == 0 and not served))
    if store.add(f"processes/{rank}", 1) > 1:
        raise Incompatible(
            f"two processes are rank {rank} of {address(environment)}: another run was launched"
            " with the same MASTER_PORT, or RANK is not set for each process"
            "\n  fix: give every run a MASTER_PORT of its own"
        )
    monitor = RankMonitor(
        PrefixStore(prefix, open_store(environment, serve=False)),
        rank,
        size,
        lost_after,
        server=TORCHRUN if served else 0,
    )
    monitor.start()
    return monitor, store


def open_store(environment: Mapping[str, str], *, serve: bool) -> Store:
    """A connection to the store, which this process serves or waits for."""
    from torch.distributed import TCPStore

    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        patience = timedelta(seconds=JOIN_TIMEOUT)
        return TCPStore(host, port, is_master=serve, timeout=patience, wait_for_workers=False)
    except RuntimeError as error:
        where = address(environment)
        if serve:
            raise Incompatible(
                f"rank 0 cannot serve {where}: {str(error).partition(chr(10))[0]}"
                "\n  fix: give this run another MASTER_PORT, which nothing else listens on"
            ) from error
        reason = f"rank 0 has not answered at {where} for {JOIN_TIMEOUT:g} s"
        raise RankLost(reason, 0, "see what it printed, and start all processes again") from error


def address(environment: Mapping[str, str]) -> str:
    """Where the store is."""
    return f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
