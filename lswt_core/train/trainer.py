"""The trainer: one optimizer update after another, each applied as a whole or not at all."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lswt_core.data import BatchStream
from lswt_core.errors import NumericsError
from lswt_core.interfaces import Batch, Optimizer, Schedule
from lswt_core.model.parameters import trainable_parameters
from lswt_core.model.train_module import CROSS_ENTROPY
from lswt_core.plugin_api.sharded_tensor import full_tensor
from lswt_core.recipe.schema import Train
from lswt_core.reporting.console import Console
from lswt_core.train.averaging import AveragedWeights
from lswt_core.train.finite import NotFinite, weights_overflow
from lswt_core.train.loss_scaler import LossScaler
from lswt_core.train.metrics import MetricsSink, UnwrittenMetrics
from lswt_core.train.out_of_memory import is_out_of_memory, out_of_memory_error
from lswt_core.train.step import Step
from lswt_core.train.step_context import StepContext
from lswt_core.train.update import Update, apply_update, hessian_update_is_due

PATIENCE = 3  # consecutive batches or Hessian estimates that may be discarded


@dataclass(frozen=True)
class TrainerComponents:
    """What updates are made of."""

    train: Train  # the recipe's [train] table
    context: StepContext
    optimizer: Optimizer
    schedule: Schedule
    batches: BatchStream
    metrics: MetricsSink
    console: Console
    average: AveragedWeights | None = None


@dataclass
class TrainerState:
    """A trainer's counters; the names are those of a checkpoint's train.json."""

    step: int = 0  # updates applied
    skipped: int = 0  # batches discarded because loss or gradient was not finite
    in_a_row: int = 0  # of those, since the last update
    evaluated: int = -1  # step of the last evaluation
    overdue: int = 0  # Hessian estimates discarded since the last good one
    seconds: float = 0.0  # spent in updates


class Trainer:
    """A training run in memory: counters, memory states and loss scale. Parameters and optimizer
    state live in model and optimizer.
    """

    def __init__(self, components: TrainerComponents) -> None:
        self.train, self.context = components.train, components.context
        self.optimizer, self.schedule = components.optimizer, components.schedule
        self.batches, self.metrics = components.batches, components.metrics
        self.console, self.average = components.console, components.average
        self.state = TrainerState()
        self.saved_step = -1  # of the last checkpoint
        self.loss_scaler = LossScaler(self.context.precision.dtype)
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.unwritten: UnwrittenMetrics | None = None
        # 1: the last update left weights that are not finite
        self.overflow = torch.zeros((), dtype=torch.float64, device=self.context.world.device)
        # one state a micro-batch; None: cold
        self.memory: list[Any] = [None] * (len(self.context.rows) // self.context.micro_batch_size)
        # the last batches, as many as memories can be rebuilt from
        length = self.context.loss.decoder.memory_length
        self.history: deque[Batch] = deque(maxlen=max(1, -(-length // self.train.seq_len)))

    @property
    def is_finished(self) -> bool:
        """Whether all updates are applied."""
        return self.state.step >= self.train.total_steps

    def advance(self) -> bool:
        """Apply the next update, or discard its batch if loss or gradient is not finite; returns
        whether it was applied. Raises NumericsError after PATIENCE discarded batches.
        """
        began = time.monotonic()
        batch = self.batches.segment()
        hessian_due = self.hessian_is_due()
        step = self.build_step(batch, hessian_due)
        lr = self.set_lr()
        try:
            update = self.apply(step, hessian_due)
        except NotFinite as error:
            self.discard(error.loss)
            return False
        if hessian_due:
            self.count_hessian_failures(update.curvature_is_finite)
        self.commit(step, batch)
        self.log(update, lr, time.monotonic() - began)
        return True

    def build_step(self, batch: Batch, hessian_due: bool) -> Step:
        """The loss of a batch at the current memory states."""
        sampling = 0.0
        if hessian_due and self.optimizer.shares_forward:
            sampling = self.optimizer.fraction
        number = self.state.step + self.state.skipped
        scale = self.loss_scaler.scale
        return Step(self.context, batch, self.memory, number, scale, sampling=sampling)

    def apply(self, step: Step, hessian_due: bool) -> Update:
        """Apply a step's update. Raises NotFinite, and ResourceError if memory runs out."""
        try:
            return apply_update(
                self.optimizer,
                step,
                trainable_parameters(self.context.loss),
                update_hessian=hessian_due,
                grad_clip=self.train.grad_clip,
                measure=lambda norm: self.measure(step, norm),
            )
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise out_of_memory_error(self.context) from error
            raise

    def set_lr(self) -> float:
        """Set the learning rate of the next update in every parameter group; returns that of the
        first.
        """
        factor = self.schedule.factor(self.state.step + 1)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * factor
        return self.peak_lrs[0] * factor

    def hessian_is_due(self) -> bool:
        """Whether the next update updates the Hessian estimate: it is due, or the last was lost."""
        if self.optimizer.hessian_update_interval and self.state.overdue > 0:
            return True
        return hessian_update_is_due(self.optimizer, self.state.step)

    def measure(self, step: Step, norm: Tensor) -> dict[str, float]:
        """A step's metrics over all ranks, by one all-reduce and the update's only synchronisation
        with the device; no losses where no token is scored. Raises NumericsError if the previous
        update made weights infinite or NaN.
        """
        sums = self.context.world.sum(torch.stack([self.overflow, *step.local_totals()]))
        counts = [step.counts[CROSS_ENTROPY], *step.counts.values()]
        means = sums[1:] / torch.stack(counts).clamp_min(1)
        overflow, labels, accuracy, *losses, grad_norm = torch.cat(
            (sums[:1], counts[0].double().reshape(1), means, norm.double().reshape(1))
        ).tolist()
        self.write_metrics()
        if overflow:
            raise self.not_finite_error("weights")
        if self.state.step == 0:
            step.check_counts()
        if not labels:
            return {"grad_norm": grad_norm}
        by_name = dict(zip(step.counts, losses, strict=True))
        loss = by_name.pop(CROSS_ENTROPY)
        values = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": accuracy,
            "grad_norm": grad_norm,
        }
        return values | {f"loss/{name}": value for name, value in by_name.items()}

    def commit(self, step: Step, batch: Batch) -> None:
        """Advance memory states, data and counters with the weights."""
        self.overflow = weights_overflow(trainable_parameters(self.context.loss))
        self.memory = step.next_memory
        self.history.append(batch)
        self.batches.advance()
        self.state.step += 1
        self.state.in_a_row = 0
        self.loss_scaler.update(found_inf=False)
        if self.average is not None:
            self.average.update(self.state.step)

    def restart_average(self) -> None:
        """Take the current weights as their average, after they were given other initial values."""
        if self.average is not None:
            self.average.restart()

    @contextmanager
    def eval_parameters(self) -> Iterator[None]:
        """A context in which the parameters hold the values to evaluate and save."""
        averaged = nullcontext() if self.average is None else self.average.in_place()
        with self.optimizer.eval_parameters(), averaged:
            yield

    def log(self, update: Update, lr: float, seconds: float) -> None:
        """Log the metrics of the update that was just applied. They are written when its statistics
        can be read without waiting for a device.
        """
        self.state.seconds += seconds
        step, tokens_per_step = self.state.step, self.train.tokens_per_step
        values = {
            **update.values,
            "tokens": step * tokens_per_step,
            "lr": lr,
            "seconds": self.state.seconds,
            "tokens_per_second": tokens_per_step / seconds,
        }
        statistics = {
            f"optimizer/{name}": full_tensor(value)
            for name, value in self.optimizer.statistics().items()
        }
        self.unwritten = UnwrittenMetrics(step, values, statistics)
        if self.context.world.device.type == "cpu":
            self.write_metrics()
        self.console.step(step, self.train.total_steps, values)

    def write_metrics(self) -> None:
        """Write the metrics of the last update, unless they are; after a synchronisation."""
        if self.unwritten is None:
            return
        step, values, statistics = self.unwritten
        self.unwritten = None
        read = {name: float(value) for name, value in statistics.items()}
        self.metrics.log(step, {**values, **read})

    def count_hessian_failures(self, is_finite: bool) -> None:
        """Count consecutive Hessian estimates that are not finite. Raises NumericsError after
        PATIENCE of them.
        """
        if is_finite:
            self.state.overdue = 0
            return
        self.state.overdue += 1
        where = f"step {self.state.step + 1}"
        self.console.warn(f"{where}: the curvature estimate is not finite and was discarded")
        if self.state.overdue >= PATIENCE:
            raise NumericsError(
                f"{where}: {PATIENCE} estimates of the curvature in a row are not finite."
                f" {self.remedy()}"
            )

    def discard(self, loss: float | None) -> None:
        """Leave out a batch whose loss or gradient is not finite; weights and memory states stay.
        An overflow that the loss scale explains lowers the scale. Raises NumericsError after
        PATIENCE other batches in a row.
        """
        self.optimizer.zero_grad()
        self.batches.advance()
        self.state.skipped += 1
        where = f"step {self.state.step + 1}"
        if loss is not None and self.loss_scaler.explains_overflow(loss):
            self.loss_scaler.update(found_inf=True)
            self.console.warn(
                f"{where}: a float16 gradient overflowed; the loss scale is now"
                f" {self.loss_scaler.scale:g}"
            )
            return
        self.state.in_a_row += 1
        rows = self.context.rows
        where += f", rows {rows.start} to {rows.stop - 1}"
        self.console.warn(f"{where}: loss or gradient is not finite; the batch was discarded")
        if self.state.in_a_row >= PATIENCE:
            raise NumericsError(
                f"{where}: {PATIENCE} batches in a row gave a loss or gradient that is not finite."
                f" {self.remedy()}"
            )

    def require_finite_weights(self) -> None:
        """Raise NumericsError if the last update left weights that are not finite, and write
        the last metrics. Synchronises with the device.
        """
        overflow = bool(self.overflow)
        self.write_metrics()
        if self.context.world.any(overflow):
            raise self.not_finite_error("weights")

    def not_finite_error(self, what: str) -> NumericsError:
        """The error for an update that left infinite or NaN values; it cannot be undone."""
        return NumericsError(
            f"step {self.state.step} left {what} that are not finite; they were not saved."
            f" {self.remedy()}"
        )

    def remedy(self) -> str:
        """What to do after numbers that are not finite."""
        cure = "lower optimizer.lr, or set train.precision = 'float32', and"
        if self.saved_step < 0:
            return f"No checkpoint was saved yet; {cure} start again"
        return (
            f"The checkpoint of step {self.saved_step} is intact; {cure} continue with --resume"
            " --accept-changes"
        )
