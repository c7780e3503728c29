"""Runs every arm with every seed, each run in a process of its own, several at once, and collects
their outcomes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lswt_core.ablation.runs.launcher import launched
from lswt_core.ablation.runs.outcome import Outcome, Study
from lswt_core.ablation.runs.progress import Job, Progress
from lswt_core.ablation.runs.store import WORKER_LOCK, RunStore
from lswt_core.ablation.runs.surroundings import Surroundings
from lswt_core.checkpoint import RunLock
from lswt_core.device import pick_device
from lswt_core.errors import BusyError, Preempted
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.reporting.units import format_duration
from lswt_core.train.signals import StopRequest

LOG = "run.log"
POLL = 0.1  # seconds between two polls of the processes
GRACE = 60.0  # seconds a run gets to save its state before it is killed
RETRY = 2.0  # seconds before a run directory that another process has locked is tried again
SETTLE = 30.0  # seconds after which a file that another machine wrote is seen here
TAIL = 2000  # bytes at the end of a log that are searched for an error


class Workers(NamedTuple):
    """How runs are started."""

    at_once: int
    threads: int  # of a process; the same for all runs, since sums depend on it
    # indices of accelerators, each for one process at a time; empty: the CPU, or torch's choice
    devices: Sequence[str]
    plugins: Sequence[Path]
    unchecked: bool = False  # plugins of others were not checked; runs record it
    launcher: Sequence[
        str
    ] = ()  # words that start a run's command elsewhere; none: a child process


class RunsStopped(Preempted):
    """The ablation was asked to stop; ``outcomes`` are those of finished runs, by key."""

    def __init__(self, outcomes: Mapping[str, Outcome], total: int) -> None:
        super().__init__(
            f"stopped with {len(outcomes)} of {total} runs finished; the others are saved as far as"
            " they got, and the same command continues them"
        )
        self.outcomes = outcomes
        self.study: Study | None = None  # of what is finished, where that is known


class Worker(NamedTuple):
    """A run's process."""

    job: Job
    process: subprocess.Popen[bytes]
    device: str
    before: tuple[int, ...]  # version of the outcome that was there before


class Runner:
    """Runs all jobs of an ablation."""

    def __init__(
        self, jobs: Sequence[Job], store: RunStore, workers: Workers, say: Callable[[str], None]
    ) -> None:
        self.jobs, self.store, self.workers, self.say = jobs, store, workers, say
        self.waiting = deque({job.key: job for job in jobs}.values())
        self.running: dict[str, Worker] = {}  # by key
        self.outcomes: dict[str, Outcome] = {}  # by key
        self.awaited: set[str] = set()  # keys of runs that another process has locked
        self.free_devices = deque(workers.devices or [""] * workers.at_once)
        # A pipe that workers read: its writing end closes when this process is gone, and they stop.
        self.pipe = (-1, -1)
        self.progress = Progress(jobs, store)

    def run(self) -> dict[str, Outcome]:
        """Run every job that has no outcome in the store yet; return outcomes by key.

        Raises RunsStopped on SIGINT, SIGTERM or SIGHUP, after the runs have saved their state.
        """
        with StopRequest().listening() as stop, self.ending_workers():
            while (self.waiting or self.running) and not stop():
                if self.waiting and self.free_devices:
                    self.start_next()
                    continue
                self.collect_finished()
                if self.progress.is_due():
                    self.say(self.progress.text(self.outcomes, [*self.running]))
                time.sleep(POLL)
            if stop() and self.running:
                self.say(
                    f"stopping: {len(self.running)} runs save their state, which takes up to"
                    f" {GRACE:.0f} s; Ctrl-C again does not wait for them"
                )
        if stop():
            raise RunsStopped(self.outcomes, self.progress.total)
        return self.outcomes

    def start_next(self) -> None:
        """Take the outcome of the next job from the store, or start its run."""
        job = self.waiting.popleft()
        known = self.store.outcome(job.key)
        if known is None:
            self.start(job)
        else:
            self.finish(job, known, "found")

    def start(self, job: Job) -> None:
        """Start a run, or continue it."""
        directory = self.store.directory(job.key)
        self.progress.start(job)
        try:
            with RunLock(directory, WORKER_LOCK):  # cheaper than a process that finds it locked
                recipe = directory / f"{job.recipe.name}.toml"
                write_atomically(recipe, job.recipe.dump().encode())
        except BusyError as error:
            self.retry(job, f" ({error})")
            return
        before = self.store.version(job.key)
        try:
            process = self.launch(recipe, directory, self.free_devices[0], job.code)
        except OSError as error:
            self.finish(job, Outcome.failed(job.seed, f"it could not be started: {error}"), "done")
            return
        self.running[job.key] = Worker(job, process, self.free_devices.popleft(), before)
        number = len(self.outcomes) + len(self.running)
        self.say(f"[{number}/{self.progress.total}] {job}: running in {directory}")

    def launch(
        self, recipe: Path, directory: Path, device: str, code: str
    ) -> subprocess.Popen[bytes]:
        """Start a run's process, in a session of its own: Ctrl-C does not reach it directly, but
        this process terminates it, so that it can save its state.
        """
        command = [
            sys.executable,
            "-m",
            "lswt_core.ablation.runs.worker",
            str(recipe),
            str(directory),
        ]
        # each device is one run's
        beside = 1 if self.workers.devices else self.workers.at_once
        command += ["--runs-at-once", str(beside), *self.place()]
        command += ["--code", code] if code else []
        for file in self.workers.plugins:
            command += ["--plugin", str(file)]
        command += ["--unchecked"] if self.workers.unchecked else []
        environment = os.environ | {"OMP_NUM_THREADS": str(self.workers.threads)}
        if device:
            environment["CUDA_VISIBLE_DEVICES"] = device
        with directory.joinpath(LOG).open("ab") as log:
            return subprocess.Popen(
                launched(self.workers.launcher, command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=self.pipe[:1],
            )

    def place(self) -> list[str]:
        """Return the arguments of a worker that say where it runs: as a child of this process, with
        which it ends, or on a machine that must be like this one.
        """
        if not self.workers.launcher:
            return ["--parent", str(self.pipe[0])]
        threads, devices = self.workers.threads, self.workers.devices
        here = Surroundings.here(pick_device(0), threads, devices)
        return ["--like", json.dumps([here.device, here.threads])]

    def collect_finished(self) -> None:
        """Record the outcomes of processes that have ended."""
        for key, worker in list(self.running.items()):
            code = worker.process.poll()
            if code is None:
                continue
            del self.running[key]
            self.free_devices.append(worker.device)
            if code == BusyError.exit_code:
                self.retry(worker.job)
            else:
                self.finish(worker.job, self.read_outcome(worker, code), "done")

    def retry(self, job: Job, why: str = "") -> None:
        """Put a job back whose directory another process has locked."""
        if job.key not in self.awaited:
            self.say(f"{job}: its directory is in use by another process; waiting for it{why}")
        self.awaited.add(job.key)
        self.progress.drop(job)
        time.sleep(RETRY)
        self.waiting.append(job)

    def read_outcome(self, worker: Worker, code: int) -> Outcome:
        """Return the outcome that a run wrote, or a failure if it wrote none."""
        job = worker.job
        deadline = time.monotonic() + (SETTLE if self.workers.launcher else 0.0)
        while self.store.version(job.key) == worker.before and time.monotonic() < deadline:
            time.sleep(POLL)
        outcome, is_new = self.store.read(job.key), self.store.version(job.key) != worker.before
        if outcome is not None and is_new and (code == 0) == (outcome.failure is None):
            return outcome
        return Outcome.failed(job.seed, find_reason(code, self.store.directory(job.key) / LOG))

    def finish(self, job: Job, outcome: Outcome, how: str) -> None:
        """Record an outcome, and print it with the time that is left."""
        self.outcomes[job.key] = outcome
        self.progress.finish(job)
        result = f"FAILED: {outcome.failure}"
        if outcome.failure is None:
            duration = format_duration(outcome.seconds)
            result = f"held-out loss {outcome.loss:.4f} ({duration} of training)"
        left = self.progress.time_left(self.outcomes, [*self.running])
        count = f"[{len(self.outcomes)}/{self.progress.total}]"
        self.say(f"{count} {job}: {how}, {result}{f'; {left}' if left else ''}")

    @contextmanager
    def ending_workers(self) -> Iterator[None]:
        """However the block ends, let running processes save their state, and leave none behind."""
        self.pipe = os.pipe()
        try:
            yield
        finally:
            for worker in self.running.values():
                worker.process.terminate()
            deadline = time.monotonic() + GRACE
            for worker in self.running.values():
                try:
                    worker.process.wait(max(deadline - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    worker.process.kill()
            for end in self.pipe:
                os.close(end)


def find_reason(code: int, log: Path) -> str:
    """Return why a run ended without an outcome, from its exit code and the end of its log."""
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines = log.read_bytes()[-TAIL:].decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error")]
    reason = (errors or lines or ["its log is empty"])[-1]
    return f"exit code {code}: {reason.removeprefix('error: ')} (see {log})"
