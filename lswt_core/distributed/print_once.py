"""Print what all ranks of a machine would say alike, such as an error in their recipe, once.
Imports torch only where ranks must agree.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

CONNECT_TIMEOUT = timedelta(seconds=10)
PRINT_TIMEOUT = timedelta(seconds=10)  # from a rank's claim of a text to its having printed it


def print_once(text: str) -> None:
    """Print a text to stderr, unless another rank on this machine has printed the same.

    Ranks that torchrun started ask the store that it serves for their launch. Where there is none,
    or it does not answer, every rank prints: an error may be said twice, but is never lost.
    """
    if not has_agent_store(os.environ):
        print_error(text)
        return
    with ignoring_sigterm():  # by which torchrun ends all ranks when the first has failed
        store, key = connect(os.environ), key_of(text)
        if store is not None and is_printed_elsewhere(store, key):
            return
        print_error(text)
        if store is not None:
            mark_printed(store, key)


def print_error(text: str) -> None:
    """Print to standard error, which may be a file on a full disk."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def has_agent_store(environment: Mapping[str, str]) -> bool:
    """Whether torchrun serves a store to several ranks."""
    served = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return served and environment.get("WORLD_SIZE", "1") != "1"


def connect(environment: Mapping[str, str]) -> Store | None:
    """The store of this launch; None if it does not answer."""
    from torch.distributed import TCPStore

    try:
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        return TCPStore(host, port, timeout=CONNECT_TIMEOUT, wait_for_workers=False)
    except (RuntimeError, ValueError, KeyError):
        return None


def is_printed_elsewhere(store: Store, key: str) -> bool:
    """Claim a text. True if another rank claimed it before and has printed it; false if this rank
    is to print it, because it is the first, or the first has died before it spoke.
    """
    try:
        if store.add(f"{key}/claims", 1) == 1:
            return False
        store.wait([f"{key}/printed"], PRINT_TIMEOUT)
    except RuntimeError:
        return False
    return True


def mark_printed(store: Store, key: str) -> None:
    """Tell the ranks that wait for a text that it is printed."""
    with suppress(RuntimeError):  # the store is gone: they print it themselves
        store.set(f"{key}/printed", "")


def key_of(text: str) -> str:
    """The key of a text: each machine, and each attempt of torchrun's, prints it for itself."""
    machine = os.environ.get("GROUP_RANK", "0")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"lswt/printed/{machine}/{attempt}/{sha256(text.encode()).hexdigest()}"


@contextmanager
def ignoring_sigterm() -> Iterator[None]:
    """Ignore SIGTERM within the block, which ends by itself; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
