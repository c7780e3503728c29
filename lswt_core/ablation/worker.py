"""One run of an ablation in a process of its own: ``python -m lswt_core.ablation.worker RECIPE
DIRECTORY``. A run that fails or is killed takes nothing else with it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import torch

from lswt_core.ablation.outcome import Outcome
from lswt_core.ablation.probes import Measured, measure
from lswt_core.ablation.store import DIVERGED, OUTCOME, write_json
from lswt_core.checkpoint import Saved
from lswt_core.data import Rows
from lswt_core.data.corpus import Corpus
from lswt_core.errors import NumericsError, ResourceError
from lswt_core.interfaces import Batch
from lswt_core.model.build import Assembled
from lswt_core.model.parameters import owners
from lswt_core.plugin_api.atomic_write import write_whole
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.exit_status import guarded
from lswt_core.reporting.run_report import read_metrics
from lswt_core.train.session import Session

START, BATCHES, PEAK = "start.json", "batches.txt", "peak.json"
SETTLING = 3  # steps whose speed is not counted: memories are still cold, libraries are loaded


class RecordedRows:
    """Rows that record a hash of every batch that was used (implements ``data.Rows``)."""

    def __init__(self, rows: Rows, path: Path, used: int) -> None:
        """``used``: number of batches used before; hashes of later ones are dropped, since those
        are read again.
        """
        self.inner = rows
        kept = path.read_text(encoding="utf-8").splitlines()[:used] if path.is_file() else []
        write_whole(path, "".join(f"{line}\n" for line in kept).encode())
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def segment(self, ahead: int = 0) -> Batch:
        """The inner rows' next tokens."""
        return self.inner.segment(ahead)

    def advance(self) -> None:
        """Commit, and write down to what."""
        batch = self.inner.segment()
        digest = sha256(b"".join(t.numpy().tobytes() for t in batch if t is not None)).hexdigest()
        self.file.write(f"{digest[:16]}\n")
        self.inner.advance()

    def state(self) -> dict[str, Any]:
        """The inner rows'. A checkpoint is about to hold it, so what was written of the batches
        before it goes to the disk.
        """
        os.fsync(self.file.fileno())
        return self.inner.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.inner.restore(state)

    def close(self) -> None:
        """The inner rows, and the file."""
        self.inner.close()
        self.file.close()


class Observed(Session):
    """A run that leaves a record of what it started with and what it read."""

    def open_rows(self, corpus: Corpus, rows: range, saved: Saved | None) -> Rows:
        """Training data whose batches are recorded."""
        used = 0
        if saved is not None:
            counters = saved.document("train")
            used = counters["step"] + counters["skipped"]
        return RecordedRows(super().open_rows(corpus, rows, saved), self.directory / BATCHES, used)

    def write_records(
        self, built: Assembled, corpus: Corpus, warm_start: dict[str, Any] | None
    ) -> None:
        """Besides the usual records, a hash of every parameter as it starts."""
        super().write_records(built, corpus, warm_start)
        path = self.directory / START
        if not path.is_file():
            write_json(
                path,
                {
                    name: fingerprint(parameter, owner)
                    for name, owner, parameter in owners(built.loss)
                },
            )

    def write_report(self) -> None:
        """None: the ablation's report draws the curves of all its runs, and a short run would spend
        half of its time here.
        """


def fingerprint(parameter: torch.Tensor, owner: str) -> dict[str, str]:
    """A parameter's shape, owner and content."""
    content = parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "shape": str(list(parameter.shape)),
        "owner": owner,
        "sha256": sha256(content).hexdigest(),
    }


def outcome(
    directory: Path, recipe: Recipe, measured: Measured | None, failure: str | None
) -> Outcome:
    """What a run left behind."""
    entries = read_metrics(directory / "metrics.jsonl")
    steps = [entry for entry in entries if entry.get("loss") is not None]
    tested = [entry for entry in entries if entry.get("eval/loss") is not None]
    per_step = recipe.train.tokens_per_step
    probes = dict(measured.probes) if measured else {}
    if steps and steps[-1].get("optimizer/unclipped_share") is not None:
        probes["unclipped_share"] = steps[-1]["optimizer/unclipped_share"]
    speeds = [entry["tokens_per_second"] for entry in steps[SETTLING:] or steps]
    peak = directory / PEAK
    return Outcome(
        seed=recipe.train.seed,
        failure=failure,
        loss=measured.loss if measured else None,
        documents=measured.documents if measured else [],
        curve=[(entry["step"] * per_step, entry["loss"]) for entry in steps],
        evaluations=[(entry["step"] * per_step, entry["eval/loss"]) for entry in tested],
        positions=measured.positions if measured else [],
        probes=probes,
        tokens_per_second=median(speeds) if speeds else None,
        peak_bytes=json.loads(peak.read_text(encoding="utf-8")) if peak.is_file() else None,
        seconds=steps[-1]["seconds"] if steps else 0.0,
    )


def reason(error: Exception) -> str:
    """The first sentence of an error: the rest is advice for a run that stands alone."""
    return str(error).partition(". ")[0].partition("\n")[0]


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: of the accelerator if it computes there, else of the
    machine.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def stop_with_parent(pipe: int) -> None:
    """Ask this process to save and stop when whoever started it is gone: then the other end of this
    pipe closes.
    """

    def wait() -> None:
        with suppress(OSError):
            while os.read(pipe, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=wait, name="lswt-parent", daemon=True).start()


def work(arguments: argparse.Namespace) -> int:
    """Train, or go on, then measure and write the outcome."""
    if arguments.parent is not None:
        stop_with_parent(arguments.parent)
    registry, directory = Registry(files=arguments.plugin), arguments.directory
    recipe = Recipe.load(arguments.recipe, registry=registry)
    session = Observed(arguments, recipe, registry, directory)
    try:
        if code := session.run():
            return code
    except NumericsError as error:
        write_json(
            directory / OUTCOME,
            outcome(directory, recipe, None, f"{DIVERGED}: {reason(error)}").to_json(),
        )
        raise
    except ResourceError as error:
        write_json(
            directory / OUTCOME,
            outcome(directory, recipe, None, f"memory or disk: {reason(error)}").to_json(),
        )
        raise
    write_json(directory / PEAK, peak_bytes(session.world.device))
    measured = measure(directory, registry)
    lost = (
        None
        if torch.isfinite(torch.tensor(measured.loss))
        else f"{DIVERGED}: the held-out loss is {measured.loss}"
    )
    write_json(
        directory / OUTCOME, outcome(directory, recipe, None if lost else measured, lost).to_json()
    )
    return NumericsError.exit_code if lost else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lswt_core.ablation.worker", description=__doc__
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument(
        "--parent",
        type=int,
        metavar="FD",
        help="a pipe's end: save and stop when the other one closes",
    )
    parser.add_argument("--plugin", action="append", default=[], type=Path, metavar="FILE")
    parser.set_defaults(
        overrides=[], out=None, resume=False, full=True, accept_changes=False, traceback=False
    )
    return guarded(work, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
