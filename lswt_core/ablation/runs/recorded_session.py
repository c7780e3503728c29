"""A training session that records what its certificate needs: a hash of every parameter's initial
value and of every batch.

Of ``Session`` it takes exactly four methods, and overrides them: ``build_loop`` (checkpoints are
kept for other runs), ``open_rows`` (the batches are recorded), ``write_records`` (initial values
are added) and ``write_report`` (nothing is drawn).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from lswt_core.ablation.runs.branch import BranchStore, requested_branches
from lswt_core.ablation.runs.run_records import BATCHES, INITIAL_VALUES
from lswt_core.ablation.runs.store import write_json
from lswt_core.checkpoint import Saved
from lswt_core.data import Rows
from lswt_core.data.corpus import Corpus
from lswt_core.interfaces import Batch
from lswt_core.model.build import BuiltModel
from lswt_core.model.parameters import parameters_with_owners
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.train.loop import TrainingLoop
from lswt_core.train.session import Session
from lswt_core.train.step_context import StepContext


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
        """Build the loop, with checkpoints at the steps at which other runs leave this one."""
        steps = requested_branches(self.directory)
        self.store = BranchStore(self.store.directory, keep=self.store.keep, branches=steps)
        return replace(super().build_loop(built, corpus, saved), checkpoint_at=steps)

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
        path = self.directory / INITIAL_VALUES
        if path.is_file():
            return
        hashes = {}
        for name, owners, parameter in parameters_with_owners(built.loss):
            hashes[name] = hash_parameter(parameter, owners)
        write_json(path, hashes)

    def write_report(self) -> None:
        """Draw nothing: the ablation's report has the curves of all runs, and a short run would
        spend half of its time here.
        """


def hash_parameter(parameter: torch.Tensor, owners: Sequence[str]) -> dict[str, Any]:
    """Return a parameter's shape, the components that it lies in and a hash of its values."""
    flat = parameter.detach().cpu().contiguous().reshape(-1)  # bytes of a scalar need a dimension
    content = flat.view(torch.uint8).numpy().tobytes()
    return {
        "shape": str(list(parameter.shape)),
        "owners": list(owners),
        "sha256": sha256(content).hexdigest(),
    }
