"""The training loop: updates, with evaluations and checkpoints at their intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lswt_core.data.held_out import HeldOut
from lswt_core.errors import Preempted
from lswt_core.train.checkpointing import Checkpointer
from lswt_core.train.evaluate import evaluate
from lswt_core.train.step_context import Interrupted
from lswt_core.train.trainer import Trainer


@dataclass(frozen=True)
class TrainingLoop:
    """A run from its current step to its last."""

    trainer: Trainer
    checkpointer: Checkpointer
    open_held_out: Callable[[], HeldOut]  # the validation set from its beginning
    evaluate_every: int  # steps; 0: only at the end
    checkpoint_every: int  # steps; 0: only at the end
    stop_requested: Callable[[], bool]  # of this rank
    checkpoint_at: frozenset[int] = frozenset()  # further steps at which a checkpoint is due

    def run(self) -> None:
        """Train to the end. Raises Preempted, after a checkpoint, if a stop was requested."""
        trainer = self.trainer
        try:
            self.run_steps()
            self.checkpointer.writer.wait()
        except Interrupted:
            trainer.optimizer.zero_grad()
            self.checkpointer.save()
            self.checkpointer.writer.wait()
            raise Preempted(
                f"stopped at step {trainer.state.step:,} of {trainer.train.total_steps:,},"
                " everything is saved"
            ) from None

    def run_steps(self) -> None:
        """Train to the end. Raises Interrupted if a stop was requested."""
        trainer = self.trainer
        state = trainer.state
        # the checkpoint may have been saved between an update and its evaluation
        if state.step and self.is_due(self.evaluate_every) and state.evaluated != state.step:
            self.evaluate()
        while not trainer.is_finished:
            self.checkpointer.writer.poll()
            if trainer.context.world.any(self.must_stop()):
                raise Interrupted
            if not trainer.advance():
                continue
            if self.is_due(self.evaluate_every):
                trainer.require_finite_weights()
                self.evaluate()
            if self.is_due(self.checkpoint_every) or trainer.state.step in self.checkpoint_at:
                self.checkpointer.save()

    def must_stop(self) -> bool:
        """Whether a stop was requested, or the last checkpoint could not be written."""
        return self.stop_requested() or self.checkpointer.writer.has_failed

    def is_due(self, interval: int) -> bool:
        """Whether something done every ``interval`` steps, and at the end, is due."""
        step = self.trainer.state.step
        return self.trainer.is_finished or (interval > 0 and step % interval == 0)

    def evaluate(self) -> None:
        """Evaluate on the validation set and log the result."""
        trainer, context = self.trainer, self.trainer.context
        with trainer.eval_parameters():
            values = evaluate(
                context.loss,
                self.open_held_out(),
                context.world,
                context.precision,
                context.stopping,
            )
        trainer.state.evaluated = trainer.state.step
        trainer.metrics.log(trainer.state.step, values)
        trainer.console.evaluation(trainer.state.step, values)

    def close(self) -> None:
        """Close the metrics file, trackers and threads; a checkpoint that was begun is finished."""
        self.checkpointer.writer.close()
        self.checkpointer.metrics.close()
        self.checkpointer.rows.close()
