"""A training session that records what its certificate needs: a hash of every parameter's initial
value and of every batch.

Of ``Session`` it takes exactly five methods, and overrides them: ``build_loop`` (the first step is
watched, and checkpoints are kept for other runs), ``open_rows`` (the batches are recorded),
``write_records`` (initial values are added), ``conclude`` (what was logged is checked) and
``write_report`` (nothing is drawn).
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

import torch

from lswt_core.ablation.runs.branch import BranchStore, requested_branches
from lswt_core.ablation.runs.imported_code import record_imports
from lswt_core.ablation.runs.run_records import BATCHES, INITIAL_VALUES, PEAK_MEMORY
from lswt_core.ablation.runs.self_check import (
    add_flaws,
    check_log,
    check_start,
    forget_flaws,
    hash_parameters,
)
from lswt_core.ablation.runs.store import write_json
from lswt_core.checkpoint import Saved
from lswt_core.data import Rows
from lswt_core.data.corpus import Corpus
from lswt_core.interfaces import Batch
from lswt_core.model.build import BuiltModel
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.train.loop import TrainingLoop
from lswt_core.train.session import Session
from lswt_core.train.step_context import StepContext
from lswt_core.train.trainer import Trainer


class RecordedRows:
    """Rows that record a hash of every batch that was used (implements ``data.Rows``)."""

    def __init__(self, rows: Rows, path: Path, used: int) -> None:
        """Continue the file after ``used`` batches; later hashes are dropped, since those batches
        are read again.
        """
        self.inner = rows
        kept = path.read_text(encoding="utf-8").splitlines()[:used] if path.is_file() else []
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self.file = path.open("a", encoding="utf-8", buffering=1)

    def segment(self, ahead: int = 0) -> Batch:
        """Return the inner rows' next batch."""
        return self.inner.segment(ahead)

    def advance(self) -> None:
        """Commit to the next batch, and record its hash, whether or not a loss looks ahead."""
        batch = self.inner.segment()._replace(labels_ahead=None)
        digest = sha256(b"".join(t.numpy().tobytes() for t in batch if t is not None)).hexdigest()
        self.file.write(f"{digest[:16]}\n")
        self.inner.advance()

    def state(self) -> dict[str, Any]:
        """Return the inner rows' state, for a checkpoint; the hashes before it are on the disk
        first.
        """
        os.fsync(self.file.fileno())
        return self.inner.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.inner.restore(state)

    def close(self) -> None:
        """Close the inner rows, and the file."""
        self.inner.close()
        self.file.close()


class RecordedSession(Session):
    """A session of an ablation's run."""

    def build_loop(self, built: BuiltModel, corpus: Corpus, saved: Saved | None) -> TrainingLoop:
        """Build the loop. Before its first update, weights are compared with the initial values;
        checkpoints are kept at the steps at which other runs leave this one.
        """
        steps = requested_branches(self.directory)
        self.store = BranchStore(self.store.directory, keep=self.store.keep, branches=steps)
        loop = replace(super().build_loop(built, corpus, saved), checkpoint_at=steps)
        if saved is None:
            forget_flaws(self.directory)

            def compare(*_: object) -> None:
                handle.remove()
                add_flaws(self.directory, check_start(self.directory, built.loss))

            handle = loop.trainer.optimizer.register_step_pre_hook(compare)
        return loop

    def open_rows(self, corpus: Corpus, context: StepContext, saved: Saved | None) -> Rows:
        """Open the training data, its batches recorded."""
        used = 0
        if saved is not None:
            counters = saved.document("train")
            used = counters["step"] + counters["skipped"]
        rows = super().open_rows(corpus, context, saved)
        return RecordedRows(rows, self.directory / BATCHES, used)

    def write_records(
        self, built: BuiltModel, corpus: Corpus, warm_start: dict[str, Any] | None
    ) -> None:
        """Write the usual records, and a hash of every parameter's initial value."""
        super().write_records(built, corpus, warm_start)
        record_imports(self.directory, self.recipe, self.registry)  # also of a run that is killed
        path = self.directory / INITIAL_VALUES
        if path.is_file():
            return
        write_json(path, hash_parameters(built.loss))

    def conclude(self, trainer: Trainer, corpus: Corpus, seconds: float, steps: int) -> None:
        """Conclude the run. The peak memory is that of this process, if it has trained."""
        super().conclude(trainer, corpus, seconds, steps)
        batches = trainer.state.step + trainer.state.skipped
        flaws = check_log(self.directory, self.recipe, self.registry, trainer.optimizer, batches)
        add_flaws(self.directory, flaws)
        if steps:
            write_json(self.directory / PEAK_MEMORY, peak_memory(self.world.device))

    def write_report(self) -> None:
        """Draw nothing: the ablation's report has the curves of all runs, and a short run would
        spend half of its time here.
        """


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process in bytes: of the accelerator if it computes there,
    else of the machine; None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
