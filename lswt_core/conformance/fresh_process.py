"""What a plugin does in a process of its own: effects of its import, and the documents of a data
source. The new process reads a request and writes a report (``main``).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import numpy as np
import torch

from lswt_core.conformance.inner_components import constructor_options
from lswt_core.interfaces import DataSource, Document
from lswt_core.registry import Registry

if TYPE_CHECKING:
    from lswt_core.conformance.subject import Subject

MAX_DOCUMENTS = 200  # read from each split
TIMEOUT = 120  # seconds


def report_of(subject: Subject) -> dict[str, Any]:
    """The report of a new process about the subject's plugin; one process for all of a plugin's
    components. Raises SkipTest if the process fails.
    """
    request: dict[str, Any] = {
        "module": subject.offer.module,
        "file": file_of(subject),
    }
    if subject.kind == "data":
        request |= {"source": subject.offer.name, "options": subject.options}
    try:
        return run(json.dumps(request))
    except (TypeError, subprocess.SubprocessError, OSError, ValueError) as error:
        raise SkipTest(f"a process of its own cannot import it: {error}") from error


def file_of(subject: Subject) -> str | None:
    """The file of a single-file plugin."""
    for entry in subject.registry.entries:
        if entry.module == subject.offer.module and entry.path is not None:
            return str(entry.path)
    return None


@cache
def run(request: str) -> dict[str, Any]:
    """Start the process, with another order of sets than this one has."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import main; main()"],
        input=request,
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["no message"])[-1])
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def search_path() -> str:
    """The process's module search path, as an environment variable."""
    return os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path if entry)


def digest(documents: Iterable[Document]) -> str:
    """A hash of the first documents in their order."""
    return blake2b(repr(list(islice(documents, MAX_DOCUMENTS))).encode()).hexdigest()


def digests(source: DataSource) -> dict[str, str]:
    """A hash of the first documents of each split, and the fingerprint."""
    return {
        "train": digest(source.documents("train")),
        "valid": digest(source.documents("valid")),
        "fingerprint": source.fingerprint(),
    }


# ---------- in the new process

# What a module may not change, with how a report calls that.
WATCHED: dict[str, Callable[[], Any]] = {
    "draws from or seeds torch's global generator": lambda: torch.get_rng_state().tolist(),
    "draws from or seeds numpy's global generator": lambda: repr(np.random.get_state()),
    "draws from or seeds Python's global generator": random.getstate,
    "sets torch's default dtype": torch.get_default_dtype,
    "sets torch's default device": lambda: str(torch.get_default_device()),
    "sets torch's number of threads": torch.get_num_threads,
    "switches gradients on or off": torch.is_grad_enabled,
    "switches deterministic algorithms on or off": torch.are_deterministic_algorithms_enabled,
    "sets the precision of float32 products": torch.get_float32_matmul_precision,
    "starts CUDA": torch.cuda.is_initialized,
}
CONNECTIONS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")


def effects_of(action: Callable[[], None]) -> list[str]:
    """What an action changes in this process."""
    connections: list[str] = []
    sys.addaudithook(
        lambda event, args: connections.append(event) if event in CONNECTIONS else None
    )
    before = {effect: read() for effect, read in WATCHED.items()}
    action()
    effects = [effect for effect, read in WATCHED.items() if read() != before[effect]]
    return effects + ["opens a network connection"] * bool(connections)


def build_source(own: Registry, *, source: str, options: dict[str, Any], **_: Any) -> DataSource:
    """A plugin's data source; components inside of it may be installed ones."""
    offer = own.find("data", source)
    modules = {entry.module for entry in own.entries}
    installed = [entry for entry in Registry().entries if entry.module not in modules]
    own.entries = (*own.entries, *installed)
    component = own.load(offer)
    built: DataSource = component(**constructor_options(own, offer, options))
    return built


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    file = request["file"]
    registry: list[Registry] = []

    def import_plugin() -> None:
        if file is None:
            __import__(request["module"])
            registry.append(Registry([sys.modules[request["module"]]]))
        else:
            registry.append(Registry([], files=[Path(file)]))
        for offer in registry[0].offers():
            registry[0].load(offer)

    report: dict[str, Any] = {"effects": effects_of(import_plugin)}
    if "source" in request:
        report["documents"] = digests(build_source(registry[0], **request))
    print(json.dumps(report))
