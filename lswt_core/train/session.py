"""One training run, from its recipe to its report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lswt_core.checkpoint import Saved, Store
from lswt_core.data import Rows
from lswt_core.data.corpus import (
    Corpus,
    open_corpus,
    open_held_out,
    open_training_rows,
    unigram_baseline,
)
from lswt_core.device import Precision, configure_process
from lswt_core.distributed.world import World
from lswt_core.errors import LswtError, Preempted, RankLost
from lswt_core.model.build import BuiltModel, build_model
from lswt_core.model.code_fingerprint import fingerprint_components
from lswt_core.model.components import build_schedule
from lswt_core.model.embedding_init import PretrainedEmbedding, load_pretrained
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.train.agreement import require_agreement, require_same_checkpoint, require_same_run
from lswt_core.train.announce import (
    announce_model,
    announce_needs,
    announce_overlay,
    announce_recipe,
    warn_of_short_schedule,
)
from lswt_core.train.averaging import average_weights
from lswt_core.train.checkpointing import Checkpointer
from lswt_core.train.conclusion import (
    announce_full_run,
    open_engine,
    write_curves_and_report,
    write_sample,
)
from lswt_core.train.environment import read_recorded, run_environment, write_run_records
from lswt_core.train.loop import TrainingLoop
from lswt_core.train.run_directory import describe_saved, hold_directory
from lswt_core.train.signals import StopRequest, blame_plugin
from lswt_core.train.start import (
    check_component_code,
    choose_sharding,
    find_checkpoint,
    initial_optimizer,
    is_finished,
    open_metrics,
    run_command,
    step_context,
    warm_start,
)
from lswt_core.train.step_context import StepContext
from lswt_core.train.trainer import Trainer, TrainerComponents

STOP_NOTICE = "stopping after this step; Ctrl-C again leaves now"


class Session:
    """A run, started or resumed in a directory."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        recipe: Recipe,
        registry: Registry,
        directory: Path,
        check: Callable[[Recipe, Callable[[str], None]], None] | None = None,
    ) -> None:
        """``recipe``: without an overlay; that of the device is applied unless ``--full``. The
        first rank calls ``check`` with the recipe and a function that prints, once the model is
        built; it may refuse to train it.
        """
        self.check = check
        self.arguments, self.registry, self.directory = arguments, registry, directory
        self.world = World.read()
        configure_process()
        self.full = recipe
        self.recipe = recipe.with_overlay(None if arguments.full else self.world.device.type)
        self.store = Store(directory / "checkpoints", keep=self.recipe.checkpoint.keep)
        train = self.recipe.train
        self.world.n_shards(train.shard)
        self.world.micro_batch_size(train.batch_size, train.micro_batch_size)
        self.precision = Precision.choose(self.recipe.train.precision, self.world.device)
        is_first = self.world.rank == 0
        self.console = Console(log_every=self.recipe.train.log_every, silent=not is_first)
        self.stop = StopRequest(STOP_NOTICE if is_first else "")
        self.components: dict[str, dict[str, str]] = {}  # code of each, once imported
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def run(self) -> int:
        """Train to the end or until a stop is requested; returns the exit code."""
        try:
            with (
                self.world.connected(self.advice) as self.world,
                self.stop.listening(),
                hold_directory(self.directory, self.world),
            ):
                return self.train()
        except Preempted as error:
            self.console.say(f"{error}\ncontinue with: {self.command('--resume')}")
            return error.exit_code
        except KeyboardInterrupt as error:
            if not self.stop.requested:
                blame_plugin(error, self.registry)
            raise
        finally:
            self.console.close()

    def train(self) -> int:
        """Prepare, train and conclude."""
        with self.world.naming_lost_ranks(), self.stop.at_once():
            prepared = self.prepare()
        if prepared is None:
            report = self.directory / "report.html"
            self.console.say(f"this run is finished: see {report}; for another, give --out DIR")
            return 0
        loop, corpus = prepared
        began, first_step = time.monotonic(), loop.trainer.state.step
        try:
            with self.world.naming_lost_ranks():
                loop.run()
        except RankLost:
            raise  # soon: the others have ended
        except LswtError:
            self.write_report()
            raise
        finally:
            loop.close()
        steps = loop.trainer.state.step - first_step
        self.conclude(loop.trainer, corpus, time.monotonic() - began, steps)
        return 0

    # ---------- before the first step

    def prepare(self) -> tuple[TrainingLoop, Corpus] | None:
        """Check, load and build everything before the first step; None if the run is finished.
        What may be refused comes before what is slow.
        """
        self.console.say(f"recipe {self.recipe.source} -> {self.directory}")
        announce_overlay(self.console, self.recipe, self.full, self.world.device)
        announce_recipe(self.console, self.recipe)
        require_same_run(self.world, self.recipe, self.registry, self.precision, self.directory)
        self.world = self.world.with_mesh(self.recipe.train.shard)
        saved = find_checkpoint(self.store, self.recipe, self.world, self.arguments, self.console)
        require_same_checkpoint(self.world, saved)
        report = self.directory / "report.html"
        finished = saved is not None and is_finished(saved, self.recipe, report, self.records)
        if saved is not None and self.world.any(finished):
            return None
        built = self.assemble_model(saved)
        if self.check is not None and self.world.rank == 0:
            self.check(self.recipe, self.console.say)
        embeddings = load_pretrained(self.recipe.embedding) if saved is None else None
        corpus = open_corpus(self.recipe, self.registry, self.world, self.console.reading)
        require_agreement(self.world, corpus.fingerprint())
        self.console.close()
        loop = self.build_loop(built, corpus, saved)
        try:
            self.start(loop, built, corpus, embeddings, saved)
        except BaseException:
            loop.close()
            raise
        return loop, corpus

    def assemble_model(self, saved: Saved | None) -> BuiltModel:
        """The model on the meta device. Raises CheckpointError if its code is not the checkpoint's,
        and ResourceError if it does not fit into memory.
        """
        built = build_model(
            self.recipe, self.registry, device=self.world.device, dtype=self.precision.dtype
        )
        self.components = fingerprint_components(
            self.recipe.components(), self.registry, built.backends
        )
        if saved is not None:
            check_component_code(saved, self.components, self.arguments, self.console)
        announce_model(self.console, built, self.world, self.precision)
        announce_needs(self.console, self.recipe, self.registry, self.world, self.directory)
        schedule = build_schedule(self.recipe, self.registry)
        warn_of_short_schedule(self.console, schedule, self.recipe)
        return built

    def start(
        self,
        loop: TrainingLoop,
        built: BuiltModel,
        corpus: Corpus,
        embeddings: PretrainedEmbedding | None,
        saved: Saved | None,
    ) -> None:
        """Restore or warm-start the model, and write the run's records."""
        warm_started = None
        if saved is not None:
            loop.checkpointer.restore(saved)
            warm_started = read_recorded(self.records, "warm_start", self.console.warn)
        elif embeddings is not None:
            warm_started = warm_start(built, embeddings, corpus, self.world, self.console)
            loop.trainer.restart_average()
        self.write_records(built, corpus, warm_started)

    def build_loop(self, built: BuiltModel, corpus: Corpus, saved: Saved | None) -> TrainingLoop:
        """Initialise the model, and build optimizer, data, metrics and the loop over them."""
        recipe, console = self.recipe, self.console
        context = step_context(built, recipe.train, self.world, self.precision, self.stopping)
        shard = choose_sharding(self.world, recipe, self.registry, self.precision)
        optimizer = initial_optimizer(
            built.loss, recipe, self.registry, self.world.device, shard, console
        )
        average = average_weights(recipe, self.registry, context.loss, optimizer)
        schedule = build_schedule(recipe, self.registry)
        baseline = unigram_baseline(recipe, corpus)
        metrics = open_metrics(recipe, self.registry, self.directory, self.world, saved, console)
        rows = self.open_rows(corpus, context, saved)
        components = TrainerComponents(
            recipe.train, context, optimizer, schedule, rows, metrics, console, average
        )
        trainer = Trainer(components)
        return TrainingLoop(
            trainer,
            Checkpointer(
                trainer, self.store, rows, metrics, recipe, corpus.fingerprint(), self.components
            ),
            open_held_out=lambda: open_held_out(recipe, corpus, self.world, baseline),
            evaluate_every=recipe.evaluate.every,
            checkpoint_every=recipe.checkpoint.every,
            stop_requested=self.stop,
        )

    def open_rows(self, corpus: Corpus, context: StepContext, saved: Saved | None) -> Rows:
        """The rows of the training data that this rank reads."""
        return open_training_rows(self.recipe, corpus, self.world, context.loss.lookahead)

    def stopping(self) -> bool:
        """Whether to stop within a step; several ranks can only stop together, between steps."""
        return self.world.size == 1 and self.stop()

    @property
    def records(self) -> Path:
        """The file of everything besides the recipe that a result may depend on."""
        return self.directory / "environment.json"

    def write_records(
        self, built: BuiltModel, corpus: Corpus, warm_start: dict[str, Any] | None
    ) -> None:
        """Write the resolved recipe and the environment of the run."""
        if self.world.rank > 0:
            return
        record = {
            "command": self.command(),
            "started": self.started,
            "fingerprint": corpus.fingerprint(),
            "warm_start": warm_start,
            **run_environment(
                self.recipe, built, self.world, self.precision, self.arguments.unchecked
            ),
        }
        write_run_records(self.directory, self.recipe, self.records, record)

    # ---------- after the last step

    def conclude(self, trainer: Trainer, corpus: Corpus, seconds: float, steps: int) -> None:
        """Write sample and report, and estimate the time of the full run from ``steps`` made."""
        with trainer.eval_parameters():
            engine = open_engine(trainer.context, self.recipe.train.seq_len)
            write_sample(engine, self.recipe, corpus, self.directory, self.console, self.stopping)
        self.write_report()
        if steps and self.recipe.overlay is not None:
            rate = steps * self.recipe.train.tokens_per_step / seconds
            announce_full_run(self.console, self.full, rate)
        self.console.say(f"done: {self.directory}")

    def write_report(self) -> None:
        """Write curves and report of what was logged so far."""
        if self.world.rank == 0:
            write_curves_and_report(self.directory, self.console)

    def advice(self) -> str:
        """What is saved, and how to go on, where a rank is lost."""
        return describe_saved(self.store, self.command())

    def command(self, *more: str) -> str:
        """The command line of this run."""
        return run_command(self.arguments, self.directory, *more)
