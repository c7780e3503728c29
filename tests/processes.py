"""``run(module, ...)``: what ``subprocess.run`` does with ``python -m module ...``, sooner. The
process is forked from one that has imported the libraries, the core and the plugins, which take
longer than a run of twelve steps. All else is a process's own: its environment, directory, signals,
exit code. Where something may depend on how Python itself starts (hashing, what is imported), tests
start real processes.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

PRELOADED = (
    "torch",
    "torch._dynamo",
    "matplotlib.figure",
    "matplotlib.projections",
    "matplotlib.backends.backend_agg",
    "scipy.stats",
    "lswt_core.train.session",
    "lswt_core.ablation.study",
)
REQUEST = 2**20  # bytes of a request at most
Done = subprocess.CompletedProcess[str]


def run(
    module: str,
    *words: object,
    cwd: Path,
    input: str | None = None,
    timeout: float = 280,
    pictures: bool = True,
    plugins: bool = True,
    **settings: object,
) -> Done:
    """``python -m module words`` in ``cwd`` with more environment variables; what it printed is
    captured as text. Without ``pictures`` matplotlib is as if it were not installed, which saves a
    third of a short run's time. Without ``plugins`` none is imported beforehand.
    """
    surroundings = environment(**settings)
    command = [sys.executable, "-m", module, *map(str, words)]
    if sys.platform != "linux":  # forking after torch was imported is not safe elsewhere
        return subprocess.run(
            command,
            cwd=cwd,
            env=surroundings,
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    with (
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        stdin.write(input or "")
        stdin.seek(0)
        request = json.dumps(
            {
                "words": command[2:],
                "cwd": str(cwd),
                "environment": surroundings,
                "pictures": pictures,
            }
        ).encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
            line.settimeout(timeout)
            line.connect(server(plugins))
            socket.send_fds(line, [request], [file.fileno() for file in (stdin, out, err)])
            pid = int(line.recv(64))
            try:
                code = int(line.recv(64))
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


def environment(**settings: object) -> dict[str, str]:
    """This process's environment and more, for one thread."""
    return (
        os.environ
        | {"OMP_NUM_THREADS": "1"}
        | {name: str(value) for name, value in settings.items()}
    )


@functools.cache
def server(plugins: bool) -> str:
    """Start this process's server and return its address. It ends when this process ends. One that
    imports no plugin has another order of sets than this process.
    """
    directory = tempfile.TemporaryDirectory(prefix="lswt-")
    atexit.register(directory.cleanup)
    address = str(Path(directory.name) / "socket")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    words, settings = [sys.executable, __file__, address], environment()
    if plugins:
        words.append("plugins")
    else:
        settings["PYTHONHASHSEED"] = "2" if settings.get("PYTHONHASHSEED") == "1" else "1"
    process = subprocess.Popen(words, env=settings, text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    atexit.register(process.communicate)
    return address


def serve(address: str) -> list[str]:
    """Answer requests while standard input is open. Returns in processes that were asked for, with
    the words each was asked to run.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:
            sys.exit()
        line = listening.accept()[0]
        request, files, _, _ = socket.recv_fds(line, REQUEST, 3)
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return keep(line, json.loads(request), files)
        line.close()
        for file in files:
            os.close(file)


def keep(line: socket.socket, request: dict[str, object], files: list[int]) -> list[str]:
    """Fork what was asked for, tell its number and, once it has ended, its exit code."""
    pid = os.fork()
    if pid == 0:
        line.close()
        return become(request, files)
    line.send(str(pid).encode())
    line.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
    os._exit(0)


def become(request: dict[str, object], files: list[int]) -> list[str]:
    """The process that was asked for: its streams, its directory, its environment."""
    for stream, file in enumerate(files):
        os.dup2(file, stream)
        os.close(file)
    sys.stdin = open(0)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(str(request["cwd"]))
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    if not request["pictures"]:
        sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    return list(request["words"])  # type: ignore[call-overload]


def preload(plugins: bool) -> None:
    """Import what processes will need, except for the modules that are run as scripts."""
    for name in PRELOADED:
        with suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    registry = importlib.import_module("lswt_core.registry").Registry()
    for offer in registry.offers() if plugins else ():
        registry.load(offer)
    gc.freeze()  # what was imported stays shared between the processes


if __name__ == "__main__":
    preload(plugins=len(sys.argv) > 2)
    module, *arguments = serve(sys.argv[1])
    sys.argv, sys.path[0] = [module, *arguments], str(Path.cwd())
    runpy.run_module(module, run_name="__main__", alter_sys=True)
