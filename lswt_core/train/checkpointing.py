"""What a checkpoint of a training run contains, and how a trainer is restored from one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lswt_core.checkpoint import Saved, Store
from lswt_core.checkpoint.compatibility import check_fingerprint
from lswt_core.checkpoint.pieces import Piece, piece_of, row_piece
from lswt_core.checkpoint.train_state import (
    load_model,
    model_tensors,
    optimizer_state,
    restore_optimizer,
)
from lswt_core.data import Rows
from lswt_core.distributed.world import World
from lswt_core.recipe import Recipe
from lswt_core.train.background_writer import BackgroundWriter, copy_to_host
from lswt_core.train.finite import find_nonfinite
from lswt_core.train.memory_state import capture_memory, restore_memory
from lswt_core.train.metrics import Metrics
from lswt_core.train.restored_pieces import read_group
from lswt_core.train.trainer import Trainer, TrainerState

SHOWN_NAMES = 3  # of tensors, in an error


@dataclass
class Checkpointer:
    """Saves a trainer to a store and restores it. A checkpoint holds parameters, optimizer state,
    memory states, counters, loss scale and data position. Where weights are averaged, the model's
    parameters are the average, and "trained" holds the weights that training goes on with.

    All ranks save and restore together, each its pieces of the tensors and its rows' memories.
    """

    trainer: Trainer
    store: Store
    rows: Rows
    metrics: Metrics
    recipe: Recipe
    fingerprint: dict[str, str]  # of data and tokenizer
    components: dict[str, dict[str, str]]  # distribution, version and code hash of each

    def __post_init__(self) -> None:
        self.writer = BackgroundWriter(self.announce)
        self.step_begun = -1  # of the last checkpoint that was begun

    def announce(self, path: Path) -> None:
        """A checkpoint is complete."""
        self.trainer.console.saved(path)
        self.trainer.saved_step = self.step_begun

    def save(self) -> None:
        """Write a checkpoint, unless this step has one; where ``checkpoint.asynchronous``, go on
        while it is written. Raises NumericsError, and writes nothing, if a tensor is not finite;
        and what the last write raised.
        """
        trainer = self.trainer
        self.writer.wait()
        if trainer.saved_step == trainer.state.step:
            return
        trainer.require_finite_weights()
        # before eval_parameters: "replay" rebuilds states with the weights that are trained
        memory, outline = capture_memory(trainer, self.recipe.checkpoint.memory)
        trained = {} if trainer.average is None else trainer.average.trained_tensors()
        with trainer.eval_parameters():
            moments, scalars = optimizer_state(trainer.optimizer)
            groups = {
                "model": model_tensors(trainer.context.loss),
                "optimizer": moments,
                "memory": memory,
            }
            if trained:
                groups["trained"] = trained
            self.require_finite(groups)
            self.write(groups, self.documents(self.merged(scalars), outline))
            if not self.is_asynchronous:  # the tensors themselves are written, not a copy
                self.writer.wait()

    def require_finite(self, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raise NumericsError, on every rank, if a rank's tensor has an infinite or NaN element."""
        world = self.trainer.context.world
        found = world.gather_texts(json.dumps(find_nonfinite(groups)))
        names = sorted({name for of_rank in found for name in json.loads(of_rank)})
        if not names:
            return
        shown = ", ".join(names[:SHOWN_NAMES])
        if len(names) > SHOWN_NAMES:
            shown += ", ..."
        raise self.trainer.not_finite_error(f"{len(names)} tensors ({shown})")

    def merged(self, scalars: dict[str, Any]) -> dict[str, Any]:
        """Optimizer state that is no tensor, of all ranks: each has that of its own matrices, and
        of their groups, where the optimizer updates whole matrices.
        """
        found = self.trainer.context.world.gather_texts(json.dumps(scalars))
        first, *others = map(json.loads, found)
        for other in others:
            first["state"] |= other["state"]
            for name, group in zip(other["group_names"], other["groups"], strict=True):
                if name not in first["group_names"]:
                    first["group_names"].append(name)
                    first["groups"].append(group)
        return dict(first)

    def write(
        self, groups: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
    ) -> None:
        """Begin to write a checkpoint; the metrics of its steps reach the disk first."""
        self.metrics.sync()
        step, world = self.trainer.state.step, self.trainer.context.world
        rows, total = self.trainer.context.rows, self.trainer.train.batch_size
        pieces = {
            group: {name: piece_of(tensor) for name, tensor in members.items()}
            for group, members in groups.items()
        }
        pieces["memory"] = {
            name: row_piece(tensor, rows, total) for name, tensor in groups["memory"].items()
        }
        if self.is_asynchronous:
            pieces = copy_to_host(pieces, but=("memory",))  # which was gathered for this
        self.step_begun = step
        self.writer.submit(partial(save_pieces, self.store, step, pieces, documents, world))

    @property
    def is_asynchronous(self) -> bool:
        """Whether training goes on while a checkpoint is written."""
        wanted = self.recipe.checkpoint.asynchronous
        return wanted is True or (
            wanted == "auto" and self.trainer.context.world.device.type != "cpu"
        )

    def documents(self, optimizer_scalars: dict[str, Any], memory_outline: Any) -> dict[str, Any]:
        """The JSON documents of a checkpoint."""
        trainer = self.trainer
        return {
            "train": {
                **asdict(trainer.state),
                "loss_scale": trainer.loss_scaler.state(),
                "tokens": trainer.state.step * trainer.train.tokens_per_step,
                "memory": memory_outline,
            },
            "optimizer": optimizer_scalars,
            "data": self.rows.state(),
            "fingerprint": self.fingerprint,
            "components": self.components,
            "recipe": self.recipe.resolved(),
        }

    def restore(self, saved: Saved) -> None:
        """Restore the trainer from a checkpoint. Raises CheckpointError or DataError if it belongs
        to another text, tokenizer or model.
        """
        trainer = self.trainer
        check_fingerprint(saved.document("fingerprint"), self.fingerprint)
        document = saved.document("train")
        load_model(trainer.context.loss, read_group(saved, "model", trainer))
        if trainer.average is not None:
            trainer.average.restore(read_group(saved, "trained", trainer))
        restore_optimizer(
            trainer.optimizer,
            read_group(saved, "optimizer", trainer),
            saved.document("optimizer"),
        )
        self.rows.restore(saved.document("data"))
        names = [field.name for field in fields(TrainerState)]
        trainer.state = TrainerState(**{name: document[name] for name in names})
        trainer.loss_scaler.load_state(document["loss_scale"])
        trainer.saved_step = trainer.state.step
        mode = self.recipe.checkpoint.memory
        memory = read_group(saved, "memory", trainer)
        restore_memory(trainer, mode, memory, document["memory"])


def save_pieces(
    store: Store,
    step: int,
    pieces: Mapping[str, Mapping[str, Piece]],
    documents: Mapping[str, Any],
    world: World,
) -> Path:
    """Write a checkpoint by all ranks of a run, which may be one. Returns its directory."""
    if world.size == 1:
        return store.save(step, pieces, documents)
    from lswt_core.checkpoint.sharded import save_together

    return save_together(store, step, pieces, documents, world.in_background())
