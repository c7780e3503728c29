"""The training loop: steps that commit as a whole, evaluations, checkpoints, and a stop that loses
nothing.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lswt_core.checkpoint import Saved, Store
from lswt_core.checkpoint.train_state import (
    check_fingerprint,
    load_model,
    model_tensors,
    optimizer_state,
    restore_optimizer,
)
from lswt_core.data import Rows
from lswt_core.data.held_out import HeldOut
from lswt_core.errors import NumericsError, Preempted, ResourceError
from lswt_core.interfaces import Batch, Memory, Objective, Optimizer, Schedule
from lswt_core.model.parameters import trainable_parameters
from lswt_core.model.train_module import CROSS_ENTROPY
from lswt_core.plugin_api.pytree import (
    concatenate_rows,
    detach_state,
    flatten,
    split_rows,
    tree_map,
    unflatten,
)
from lswt_core.recipe import Recipe
from lswt_core.reporting.console import Console
from lswt_core.train.evaluate import evaluate
from lswt_core.train.finite import damaged, overflow
from lswt_core.train.loss_scaler import LossScale
from lswt_core.train.metrics import Metrics
from lswt_core.train.step import (
    Interrupted,
    NotFinite,
    Step,
    StepContext,
    clip,
    gradient_norm,
    sum_of,
    update_curvature,
)

# what a checkpoint holds of a trainer itself
POSITION = ("step", "skipped", "in_a_row", "evaluated", "overdue", "seconds")
PATIENCE = 3  # steps in a row that may be discarded before the run stops


class Plan(NamedTuple):
    """Everything a trainer works with; built once, changed never."""

    recipe: Recipe
    setting: StepContext
    optimizer: Optimizer
    schedule: Schedule
    rows: Rows
    held_out: Callable[[], HeldOut]  # at its beginning again at every call
    fingerprint: dict[str, str]  # of data and tokenizer
    # by kind and name: who offers each, and a hash of its code
    components: dict[str, dict[str, str]]
    store: Store
    metrics: Metrics
    console: Console
    stop: Callable[[], bool]  # has this process been asked to stop?


class Trainer:
    """A run in progress: its position, memories and history; weights and moments live in model and
    optimizer.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps = plan.recipe.train.total_steps
        self.step = 0  # updates committed
        self.skipped = 0  # batches discarded because something was not finite
        self.in_a_row = 0  # of those, without a good one between
        self.evaluated = -1  # step of the last evaluation
        self.saved = -1  # step of the last checkpoint
        self.overdue = 0  # refreshes of the curvature that failed, since a good one
        self.seconds = 0.0  # spent in steps
        # 1: the last update's weights are lost
        self.overflow = torch.zeros((), dtype=torch.float64, device=plan.setting.world.device)
        self.scale = LossScale(plan.setting.precision.dtype)
        self.memory: list[Any] = [None] * (len(plan.setting.rows) // plan.setting.micro_batch_size)
        self.peaks = [group["lr"] for group in plan.optimizer.param_groups]
        reach = max(
            (m.length for m in plan.setting.loss.modules() if isinstance(m, Memory)), default=0
        )
        # what a memory is replayed from
        self.history: deque[Batch] = deque(maxlen=max(1, -(-reach // plan.recipe.train.seq_len)))

    # ---------- the loop

    def run(self) -> None:
        """Train to the end. Raises Preempted, with everything saved, if asked to stop before."""
        every = self.plan.recipe.evaluate.every, self.plan.recipe.checkpoint.every
        try:
            if self.step and self.due(every[0]) and self.evaluated != self.step:
                self.evaluate()  # the last part stopped between a step and its evaluation
            while self.step < self.steps:
                if self.plan.setting.world.any(self.plan.stop()):
                    raise Interrupted
                before = self.step
                self.advance()
                if self.step > before and self.due(every[0]):
                    self.require_weights()
                    self.evaluate()
                if self.step > before and self.due(every[1]):
                    self.save()
        except Interrupted:
            self.plan.optimizer.zero_grad()
            self.save()
            raise Preempted(
                f"stopped at step {self.step:,} of {self.steps:,}, everything is saved"
            ) from None

    def close(self) -> None:
        """Let go of files and threads; what was logged and saved stays."""
        self.plan.metrics.close()
        self.plan.rows.close()

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        return self.step == self.steps or (bool(every) and self.step % every == 0)

    def advance(self) -> None:
        """One update, committed only if everything is finite."""
        began = time.monotonic()
        setting, batch = self.plan.setting, self.plan.rows.segment()
        refreshing, shared = self.refreshes()
        sampling = self.plan.optimizer.fraction if shared else 0.0
        step = Step(
            setting,
            batch,
            self.memory,
            self.step + self.skipped,
            self.scale.value,
            sampling=sampling,
        )
        lr = self.set_rate()
        try:
            step.backward("data")
            norm = gradient_norm(trainable_parameters(setting.loss))
            values = self.measure(step, norm)
        except NotFinite:
            self.discard(batch)
            return
        except RuntimeError as error:
            if is_shortage(error):
                raise too_little_memory(setting) from error
            raise
        if not all(math.isfinite(values[name]) for name in ("loss", "grad_norm")):
            self.give_way(batch) if self.scale.can_give_way(values["loss"]) else self.discard(batch)
            return
        clip(
            trainable_parameters(setting.loss),
            norm,
            values["grad_norm"],
            self.plan.recipe.train.grad_clip,
        )
        if step.sampled is not None:
            self.update_curvature(step.sampled)
        self.plan.optimizer.step()
        self.plan.optimizer.zero_grad()
        self.overflow = overflow(trainable_parameters(setting.loss))
        self.commit(step, batch)
        if refreshing and not shared:
            self.update_curvature(step)
        elapsed = time.monotonic() - began
        self.seconds += elapsed
        values |= {
            "tokens": self.step * self.plan.recipe.train.tokens_per_step,
            "lr": lr,
            "seconds": self.seconds,
        }
        values["tokens_per_second"] = self.plan.recipe.train.tokens_per_step / elapsed
        values |= {
            f"optimizer/{name}": float(value)
            for name, value in self.plan.optimizer.statistics().items()
        }
        self.plan.metrics.log(self.step, values)
        self.plan.console.step(self.step, self.steps, values)

    def set_rate(self) -> float:
        """The learning rate of the next update."""
        factor = self.plan.schedule.factor(self.step + 1)
        for group, peak in zip(self.plan.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.peaks[0] * factor

    def measure(self, step: Step, norm: Tensor) -> dict[str, float]:
        """The step's numbers over all processes: the one point at which the host waits for the
        device. Raises NumericsError if the update before it has lost the weights.
        """
        names = list(step.results[0].terms)
        local = [self.overflow, sum_of([result.correct.double() for result in step.results])]
        local += [
            sum_of([result.terms[name].total.double() for result in step.results]) for name in names
        ]
        sums = step.setting.world.sum(torch.stack(local).detach())
        means = sums[1:] / torch.stack(
            [step.counts[CROSS_ENTROPY], *(step.counts[name] for name in names)]
        ).clamp_min(1)
        overflowed, accuracy, *losses, grad_norm = torch.cat(
            (sums[:1], means, norm.double().reshape(1))
        ).tolist()
        if overflowed:
            raise self.lost("weights")
        if self.step == 0:
            step.check_counts()
        found = dict(zip(names, losses, strict=True))
        entropy = found.pop(CROSS_ENTROPY)
        values = {
            "loss": entropy,
            "perplexity": math.exp(min(entropy, 700.0)),
            "accuracy": accuracy,
            "grad_norm": grad_norm,
        }
        return values | {f"loss/{name}": value for name, value in found.items()}

    def commit(self, step: Step, batch: Batch) -> None:
        """Weights and moments have moved: memories, cursors and counters move with them."""
        self.memory = step.staged
        self.history.append(batch)
        self.plan.rows.advance()
        self.step += 1
        self.in_a_row = 0
        self.scale.held()

    def refreshes(self) -> tuple[bool, bool]:
        """Whether a second-order optimizer looks at the curvature with the next update, and whether
        from its forward pass.
        """
        every = self.plan.optimizer.hessian_update_interval
        due = bool(every) and (self.step % every == 0 or self.overdue > 0)
        return due, due and self.plan.optimizer.shares_forward

    def update_curvature(self, objective: Objective) -> None:
        """Let it look: before the update where it shares the forward pass, else after it, on the
        same batch and memories.
        """
        try:
            update_curvature(
                self.plan.optimizer, objective, trainable_parameters(self.plan.setting.loss)
            )
            self.overdue = 0
        except NotFinite:
            self.overdue += 1
            where = (
                f"step {self.step + 1}"
                if self.plan.optimizer.shares_forward
                else f"step {self.step}"
            )
            self.plan.console.warn(
                f"{where}: the curvature estimate is not finite and was discarded"
            )
            if self.overdue >= PATIENCE:
                raise NumericsError(
                    f"{where}: {PATIENCE} estimates of the curvature in a row are not finite."
                    f" {self.remedy()}"
                ) from None

    def give_way(self, batch: Batch) -> None:
        """A gradient overflowed in float16: leave this batch out, and scale less from here on. It
        is no fault of the run's.
        """
        self.plan.optimizer.zero_grad()
        self.plan.rows.advance()
        self.skipped += 1
        self.scale.give_way()
        self.plan.console.warn(
            f"step {self.step + 1}: a float16 gradient overflowed; the loss scale is now"
            f" {self.scale.value:g}"
        )

    def discard(self, batch: Batch) -> None:
        """Leave weights, moments and memories as they were and go on with the next batch."""
        self.plan.optimizer.zero_grad()
        self.plan.rows.advance()
        self.skipped += 1
        self.in_a_row += 1
        where = (
            f"step {self.step + 1}, rows {self.plan.setting.rows.start} to"
            f" {self.plan.setting.rows.stop - 1}"
        )
        self.plan.console.warn(f"{where}: loss or gradient is not finite; the batch was discarded")
        if self.in_a_row >= PATIENCE:
            raise NumericsError(
                f"{where}: {PATIENCE} batches in a row gave a loss or gradient that is not finite."
                f" {self.remedy()}"
            )

    def require_weights(self) -> None:
        """Raise NumericsError if the last update has lost the weights. The device is waited for, as
        whoever asks is about to anyway.
        """
        if self.plan.setting.world.any(bool(self.overflow)):
            raise self.lost("weights")

    def lost(self, what: str) -> NumericsError:
        """What to tell when an update left something infinite or not a number: it cannot be taken
        back.
        """
        return NumericsError(
            f"step {self.step} left {what} that are not finite; they were not saved."
            f" {self.remedy()}"
        )

    def remedy(self) -> str:
        """How a run that ended with numbers that are not finite may be mended."""
        cure = "lower optimizer.lr, or set train.precision = 'float32', and"
        if self.saved < 0:
            return f"No checkpoint was saved yet; {cure} start again"
        return (
            f"The checkpoint of step {self.saved} is intact; {cure} continue with --resume"
            " --accept-changes"
        )

    def evaluate(self) -> None:
        """Measure the model on the held-out text."""
        setting = self.plan.setting
        with self.plan.optimizer.eval_parameters():
            values = evaluate(
                setting.loss,
                self.plan.held_out(),
                setting.world,
                setting.precision,
                setting.stopping,
            )
        self.evaluated = self.step
        self.plan.metrics.log(self.step, values)
        self.plan.console.evaluation(self.step, values)

    # ---------- checkpoints

    def save(self) -> None:
        """Write everything a resumed run needs; does nothing if this step is saved already. Raises
        NumericsError, and writes nothing, where a number of it is not finite.
        """
        if self.saved == self.step:
            return
        self.require_weights()
        memory = self.capture_memory()  # of the weights that are trained
        with self.plan.optimizer.eval_parameters():
            groups, documents = self.capture(*memory)
            if names := damaged(groups):
                raise self.lost(
                    f"{len(names)} tensors"
                    f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                )
            if self.plan.setting.world.rank == 0:
                self.plan.metrics.sync()
                path = self.plan.store.save(self.step, groups, documents)
                self.plan.console.saved(path)
        self.plan.setting.world.wait()
        self.saved = self.step

    def capture(
        self, memory: Mapping[str, Tensor], outline: Any
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by group and documents of a checkpoint."""
        world = self.plan.setting.world
        moments, scalars = optimizer_state(self.plan.optimizer)
        groups = {
            "model": model_tensors(self.plan.setting.loss),
            "optimizer": moments,
            "memory": {name: world.gather_rows(tensor) for name, tensor in memory.items()},
        }
        position = {key: getattr(self, key) for key in POSITION}
        documents = {
            "train": (
                position
                | {"loss_scale": self.scale.state()}
                | {"tokens": self.step * self.plan.recipe.train.tokens_per_step, "memory": outline}
            ),
            "optimizer": scalars,
            "data": self.plan.rows.state(),
            "fingerprint": self.plan.fingerprint,
            "components": self.plan.components,
            "recipe": self.plan.recipe.resolved(),
        }
        return groups, documents

    def capture_memory(self) -> tuple[dict[str, Tensor], Any]:
        """The memories themselves, or the tokens to rebuild them from; then the live run rebuilds
        its own too, so that going on and resuming are the same.
        """
        if self.plan.recipe.checkpoint.memory == "exact":
            return flatten(concatenate_rows(self.memory), "memory")
        tokens = flatten(
            tuple(
                {k: t for k, t in batch._asdict().items() if t is not None}
                for batch in self.history
            ),
            "history",
        )
        self.replay()
        return tokens

    def replay(self) -> None:
        """Rebuild the memories from the tokens in the history, from cold."""
        setting = self.plan.setting
        self.memory = [None] * len(self.memory)
        with torch.no_grad(), setting.precision.autocast(setting.world.device):
            for batch in self.history:
                for i, state in enumerate(self.memory):
                    rows = slice(i * setting.micro_batch_size, (i + 1) * setting.micro_batch_size)
                    part = batch.map(
                        lambda tensor, rows=rows: tensor[rows].to(setting.world.device)
                    )  # type: ignore[misc]
                    self.memory[i] = detach_state(
                        setting.loss.decoder(part.inputs, state, part.first_visible)[1]
                    )

    def restore(self, saved: Saved) -> None:
        """Stand where a checkpoint stood."""
        check_fingerprint(saved.document("fingerprint"), self.plan.fingerprint)
        position = saved.document("train")
        load_model(self.plan.setting.loss, saved.tensors("model"))
        restore_optimizer(
            self.plan.optimizer, saved.tensors("optimizer"), saved.document("optimizer")
        )
        self.plan.rows.restore(saved.document("data"))
        for key in POSITION:
            setattr(self, key, position[key])
        self.scale.restore(position["loss_scale"])
        self.saved = self.step
        self.restore_memory(saved.tensors("memory"), position["memory"])

    def restore_memory(self, named: dict[str, Tensor], outline: Any) -> None:
        """Take this process's rows of the memories, or rebuild them."""
        setting = self.plan.setting
        mine = {
            name: tensor[setting.rows.start : setting.rows.stop] for name, tensor in named.items()
        }
        tree = unflatten(outline, mine)
        if self.plan.recipe.checkpoint.memory == "replay":
            self.history.extend(Batch(**fields) for fields in tree)
            self.replay()
            return
        here = tree_map(lambda tensor: tensor.to(setting.world.device), tree)
        self.memory = [
            detach_state(rows)
            for rows in split_rows(here, len(setting.rows), setting.micro_batch_size)
        ]


def is_shortage(error: RuntimeError) -> bool:
    """Whether an allocation failed; on the CPU torch says so only in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def too_little_memory(setting: StepContext) -> ResourceError:
    """What to tell when a step does not fit."""
    device, rows = setting.world.device, setting.micro_batch_size
    if rows == 1:
        return ResourceError(
            f"not even one row fits into the memory of {device}: shorten train.seq_len or take a"
            " smaller model"
        )
    return ResourceError(
        f"a micro-batch of {rows} rows does not fit into the memory of {device}: "
        f"set train.micro_batch_size={rows // 2} (the result stays the same)"
    )
