"""Runs the arms and seeds of an ablation, each in a process of its own, a few at a time, and
gathers what they came to.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lswt_core.ablation.outcome import Outcome
from lswt_core.ablation.store import OUTCOME, RunStore
from lswt_core.errors import BusyError, Preempted
from lswt_core.recipe import Recipe
from lswt_core.train.signals import StopRequest

LOG = "run.log"
POLL = 0.1  # seconds between looks at the processes
FAREWELL = 60.0  # seconds a run gets to save before it is killed
HELD = 2.0  # seconds before a run directory that another process holds is tried again
TAIL = 2000  # bytes of a log in which a reason is looked for


class Job(NamedTuple):
    """One run."""

    arm: str
    seed: int
    key: str
    recipe: Recipe


class Workers(NamedTuple):
    """How runs are started."""

    at_once: int
    threads: int  # of a process; sums depend on it, so that all runs have the same
    # numbers of accelerators, dealt to the processes in turn; none: the CPU, or whatever torch
    # finds
    devices: Sequence[str]
    plugins: Sequence[Path]


class Matrix:
    """All runs of an ablation."""

    def __init__(
        self, jobs: Sequence[Job], store: RunStore, workers: Workers, say: Callable[[str], None]
    ) -> None:
        self.jobs, self.store, self.workers, self.say = jobs, store, workers, say
        # by key; the last is the device
        self.running: dict[str, tuple[Job, subprocess.Popen[bytes], str]] = {}
        self.free = deque(workers.devices or [""] * workers.at_once)
        # open while runs are made; its writing end closes when this process is gone, and they stop
        self.pipe = (-1, -1)
        self.done = 0
        self.began = time.monotonic()
        self.taken = 0  # runs made here rather than found

    def run(self) -> dict[str, Outcome]:
        """Make every run that is not in the store; outcomes by key. Raises Preempted, with
        everything saved, if asked to stop.
        """
        found: dict[str, Outcome] = {}
        waiting = deque({job.key: job for job in self.jobs}.values())
        total = len(waiting)
        with StopRequest().listening() as stop, self.ending():
            while (waiting or self.running) and not stop():
                if waiting and self.free:
                    job = waiting.popleft()
                    known = self.store.outcome(job.key)
                    if known is None:
                        self.start(job, total)
                    else:
                        found[job.key] = known
                        self.tell(job, known, total, "found")
                    continue
                for job, code in self.ended():
                    if code == BusyError.exit_code:
                        self.say(
                            f"{job.arm}, seed {job.seed}: its directory is in use by another"
                            " process; waiting for it"
                        )
                        time.sleep(HELD)
                        waiting.append(job)
                        continue
                    found[job.key] = self.result(job, code)
                    self.taken += 1
                    self.tell(job, found[job.key], total, "done")
                time.sleep(POLL)
        if stop():
            raise Preempted(
                f"stopped with {len(found)} of {total} runs done; what was running is saved"
            )
        return found

    def start(self, job: Job, total: int) -> None:
        """Begin a run, or go on with it."""
        directory = self.store.directory(job.key)
        directory.mkdir(parents=True, exist_ok=True)
        directory.joinpath(OUTCOME).unlink(missing_ok=True)  # of an earlier try
        recipe = directory / f"{job.recipe.name}.toml"
        recipe.write_text(job.recipe.dump(), encoding="utf-8")
        device = self.free.popleft()
        self.running[job.key] = (job, self.process(recipe, directory, device), device)
        self.say(
            f"[{self.done + len(self.running)}/{total}] {job.arm}, seed {job.seed}: running in"
            f" {directory}"
        )

    def process(self, recipe: Path, directory: Path, device: str) -> subprocess.Popen[bytes]:
        """A run's own process, in a group of its own: Ctrl-C reaches it through us, so that it can
        save.
        """
        words = [sys.executable, "-m", "lswt_core.ablation.worker", str(recipe), str(directory)]
        words += ["--parent", str(self.pipe[0])]
        words += [word for file in self.workers.plugins for word in ("--plugin", str(file))]
        surroundings = os.environ | {"OMP_NUM_THREADS": str(self.workers.threads)}
        surroundings |= {"CUDA_VISIBLE_DEVICES": device} if device else {}
        with directory.joinpath(LOG).open("ab") as log:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=surroundings,
                start_new_session=True,
                pass_fds=self.pipe[:1],
            )

    def ended(self) -> Iterator[tuple[Job, int]]:
        """The runs that have come to an end, and their exit codes."""
        for key, (job, process, device) in list(self.running.items()):
            code = process.poll()
            if code is not None:
                del self.running[key]
                self.free.append(device)
                yield job, code

    def result(self, job: Job, code: int) -> Outcome:
        """The outcome a run wrote, or why there is none."""
        known = self.store.read(job.key)
        if known is not None and (code == 0) == (known.failure is None):
            return known
        return Outcome.failed(job.recipe.train.seed, why(code, self.store.directory(job.key) / LOG))

    def tell(self, job: Job, outcome: Outcome, total: int, how: str) -> None:
        """A line about a run that has ended."""
        self.done += 1
        words = (
            f"FAILED: {outcome.failure}"
            if outcome.failure
            else f"held-out loss {outcome.loss:.4f} ({outcome.seconds:.0f} s of training)"
        )
        left = total - self.done - len(self.running)
        rest = (
            f"; about {(time.monotonic() - self.began) / self.taken * left / 60:.0f} min left"
            if self.taken and left > 0
            else ""
        )
        self.say(f"[{self.done}/{total}] {job.arm}, seed {job.seed}: {how}, {words}{rest}")

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Whatever happens, let what is running save, and leave no process behind."""
        self.pipe = os.pipe()
        try:
            yield
        finally:
            for _, process, _ in self.running.values():
                process.terminate()
            deadline = time.monotonic() + FAREWELL
            for _, process, _ in self.running.values():
                try:
                    process.wait(max(deadline - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    process.kill()
            for end in self.pipe:
                os.close(end)


def why(code: int, log: Path) -> str:
    """Why a run ended without an outcome."""
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines = log.read_bytes()[-TAIL:].decode(errors="replace").strip().splitlines()
    told = next(
        (line for line in reversed(lines) if line.startswith("error")),
        lines[-1] if lines else "no word",
    )
    return f"exit code {code}: {told.removeprefix('error: ')} (see {log})"
