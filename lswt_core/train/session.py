"""One training run from its recipe to its report: what is checked, shown and written, in order."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lswt_core.budget import budget
from lswt_core.budget.memory import require_memory
from lswt_core.checkpoint import RunLock, Saved, Store
from lswt_core.checkpoint.train_state import check_code, check_recipe
from lswt_core.data.corpus import Corpus, held_out, open_corpus, training_rows, unigram
from lswt_core.decode import InferenceEngine, Sample, generate
from lswt_core.device import Precision, configure_process
from lswt_core.distributed.world import World
from lswt_core.errors import CheckpointError, LswtError, PluginError, Preempted
from lswt_core.interfaces import RunInfo, Tracker
from lswt_core.model.build import BuiltModel, build_model, materialise
from lswt_core.model.code_fingerprint import fingerprint_components
from lswt_core.model.components import build_component, build_optimizer, build_schedule
from lswt_core.model.embedding_init import PretrainedEmbedding, copy_rows, load_pretrained
from lswt_core.model.parameters import count_parameters, summarise_groups
from lswt_core.plugin_api.atomic_write import make_output_directory, write_atomically
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.reporting.curves import ReportUnavailable, write_curves
from lswt_core.reporting.metrics_log import read_metrics
from lswt_core.reporting.run_report import write_report
from lswt_core.reporting.units import format_bytes, format_duration
from lswt_core.train.agreement import require_agreement, require_one_checkpoint, require_one_run
from lswt_core.train.environment import environment, is_intact, recorded
from lswt_core.train.metrics import Metrics
from lswt_core.train.signals import StopRequest
from lswt_core.train.step import StepContext
from lswt_core.train.trainer import Plan, Trainer

PROMPT_TOKENS = 32  # of a held-out document, where the recipe names no prompt


class Session:
    """A run, started or continued in a directory."""

    def __init__(
        self, arguments: argparse.Namespace, recipe: Recipe, registry: Registry, directory: Path
    ) -> None:
        self.arguments, self.registry, self.directory = arguments, registry, directory
        self.world = World.join()
        configure_process()
        overlay = (
            None
            if arguments.full or self.world.device.type not in recipe.overlays
            else self.world.device.type
        )
        self.recipe = (
            recipe
            if overlay is None
            else Recipe.load(
                arguments.recipe, arguments.overrides, overlay=overlay, registry=registry
            )
        )
        self.full = recipe
        self.precision = Precision.choose(self.recipe.train.precision, self.world.device)
        self.console = Console(log_every=self.recipe.train.log_every, silent=self.world.rank > 0)
        self.stop = StopRequest()
        self.components: dict[str, dict[str, str]] = {}  # their code, once they are imported
        self.began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def run(self) -> int:
        """Train to the end, or until asked to stop."""
        try:
            with self.alone(), self.stop.listening():
                return self.train()
        except Preempted as error:
            self.console.say(f"{error}\ncontinue with: {self.command('--resume')}")
            return error.exit_code
        except KeyboardInterrupt as error:
            culprit = None if self.stop.asked else self.registry.culprit(error)
            if culprit is None:
                raise
            raise PluginError(
                f"{culprit}\n  why: nobody has pressed Ctrl-C; this is the plugin's own code\n "
                " fix: mend it"
            ) from error
        finally:
            self.console.close()
            self.world.leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the run directory; the first process holds it for all."""
        make_output_directory(self.directory, "--out")
        if self.world.rank > 0:
            yield
            return
        with RunLock(self.directory):
            yield

    def train(self) -> int:
        """The run itself."""
        with self.stop.at_once():
            prepared = self.prepare()
        if prepared is None:
            self.console.say(
                f"this run is finished: see {self.directory / 'report.html'}; for another, give"
                " --out DIR"
            )
            return 0
        trainer, corpus = prepared
        began, first = time.monotonic(), trainer.step
        try:
            trainer.run()
        except LswtError:
            self.pictures()
            raise
        finally:
            trainer.close()
        self.conclude(trainer, corpus, time.monotonic() - began, trainer.step - first)
        return 0

    # ---------- beginning

    def prepare(self) -> tuple[Trainer, Corpus] | None:
        """All that comes before the first step; None where there is none left to make."""
        self.introduce()
        self.micro_batch_size = self.world.micro_batch_size(
            self.recipe.train.batch_size, self.recipe.train.micro_batch_size
        )  # refused before anything slow
        require_one_run(self.world, self.recipe, self.precision, self.directory)
        store = Store(self.directory / "checkpoints", keep=self.recipe.checkpoint.keep)
        saved = self.find(store)
        require_one_checkpoint(self.world, saved)
        if saved is not None and self.world.any(self.finished(saved)):
            return None
        built = build_model(
            self.recipe, self.registry, device=self.world.device, dtype=self.precision.dtype
        )
        self.read_code(built, saved)
        self.describe(built)
        self.check_schedule()
        # before the text, which may take minutes
        source = None if saved else load_pretrained(self.recipe.embedding)
        corpus = open_corpus(self.recipe, self.registry, self.world, self.console.reading)
        require_agreement(self.world, corpus.fingerprint())
        self.console.close()  # the bar of what was read
        trainer = self.build(built, corpus, store, saved)
        try:
            self.begin(trainer, built, corpus, source, saved)
        except BaseException:
            trainer.close()
            raise
        return trainer, corpus

    def begin(
        self,
        trainer: Trainer,
        built: BuiltModel,
        corpus: Corpus,
        source: PretrainedEmbedding | None,
        saved: Saved | None,
    ) -> None:
        """Stand where the run begins or goes on, and write down what it depends on."""
        if saved is None:
            self.write_records(built, corpus, self.warm_start(built, source, corpus))
        else:
            trainer.restore(saved)
            self.write_records(
                built, corpus, recorded(self.records, "warm_start", self.console.warn)
            )

    def introduce(self) -> None:
        """What will be run, and what an overlay has changed about it."""
        recipe, train = self.recipe, self.recipe.train
        self.console.say(f"recipe {recipe.source} -> {self.directory}")
        if recipe.overlay is not None:
            whole = self.full.train
            found = (
                "No accelerator was found"
                if recipe.overlay == "cpu"
                else f"The device is {self.world.device}"
            )
            lines = [
                f"{found}: the recipe's [{recipe.overlay}] overlay applies.",
                (
                    f"The full run: {whole.total_steps:,} steps of {whole.tokens_per_step:,}"
                    " tokens. --full forces it here."
                ),
                *(
                    f"  {key} = {after!r}  (full: {before!r})"
                    for key, before, after in recipe.changes()
                ),
            ]
            self.console.banner(lines)
        names = [
            (kind, recipe.one(kind).name)
            for kind in (
                "positional",
                "attention",
                "qk_norm",
                "ffn",
                "norm",
                "cross_entropy",
                "optimizer",
                "schedule",
                "data",
                "tokenizer",
            )
        ]
        names += [
            (kind, ", ".join(f"{c.name}" for c in recipe.many(kind).values()) or "-")
            for kind in ("memory", "loss")
        ]
        self.console.say("  ".join(f"{kind}={name}" for kind, name in names))
        self.console.say(
            f"{train.total_steps:,} steps of {train.batch_size} rows x {train.seq_len} tokens = "
            f"{train.total_steps * train.tokens_per_step:,} tokens"
        )

    def find(self, store: Store) -> Saved | None:
        """The checkpoint to continue from, if the directory holds one."""
        saved = store.newest(self.console.warn)
        if saved is None:
            if store.steps():
                raise CheckpointError(
                    f"{store.directory} holds checkpoints, but none is intact (see above); nothing"
                    " was changed\n  fix: restore one of them, or start another run with --out"
                )
            if self.arguments.resume:
                self.console.warn(
                    f"{self.directory} holds no checkpoint: starting from the beginning"
                )
            return None
        for key, before, after in check_recipe(
            saved, self.recipe.resolved(), accept_changes=self.arguments.accept_changes
        ):
            self.console.warn(f"continuing with {key} = {after!r} instead of {before!r}")
        self.console.say(f"continuing from {saved.path}")
        return saved

    def read_code(self, built: BuiltModel, saved: Saved | None) -> None:
        """What code the components are; it must be what the run began with."""
        self.components = fingerprint_components(self.recipe, self.registry, built.backends)
        if saved is not None:
            for note in check_code(
                saved, self.components, accept_changes=self.arguments.accept_changes
            ):
                self.console.warn(note)

    def finished(self, saved: Saved) -> bool:
        """Whether nothing is left to do: the last step is saved and evaluated, and what is written
        besides is there and whole.
        """
        done = (
            saved.step >= self.recipe.train.total_steps
            and saved.document("train")["evaluated"] == saved.step
        )
        report = self.directory / "report.html"
        return done and report.is_file() and report.stat().st_size > 0 and is_intact(self.records)

    def describe(self, built: BuiltModel) -> None:
        """Parameters by component, device, backend and why; refuses a run that does not fit before
        it is given memory.
        """
        numbers = count_parameters(built.loss)
        rows = [(owner, number) for owner, number in numbers["by_component"].items()]
        self.console.table(
            ("component", "parameters"),
            [*rows, ("total", numbers["total"]), ("trainable", numbers["trainable"])],
        )
        threads = f", {torch.get_num_threads()} threads" if self.world.device.type == "cpu" else ""
        peers = f", {self.world.size} processes" if self.world.size > 1 else ""
        self.console.say(f"device {self.world.device}{threads}{peers}")
        self.console.say(
            f"precision {self.precision.dtype} ({self.precision.why})".replace("torch.", "")
        )
        self.console.say(
            f"attention {built.attention}" + (f" ({'; '.join(built.notes)})" if built.notes else "")
        )
        taken = budget(self.recipe, self.registry, self.world)
        found, most = taken.memory.of_process(self.world), "at least" if taken.unknown else "about"
        self.console.say(
            f"memory: {most} {format_bytes(found['total'])} needed,"
            f" {format_bytes(found['available'])} free"
        )
        for what, why in taken.unknown.items():
            self.console.say(f"unknown: {what} ({why})")
        require_memory(
            found, self.world.device, self.recipe.name, taken.memory.largest_micro(self.world)
        )

    def check_schedule(self) -> None:
        """Say so if the run is too short for its learning rate, before anything slow."""
        steps = self.recipe.train.total_steps
        schedule = build_schedule(self.recipe, self.registry)
        highest = max(schedule.factor(step) for step in sampled(steps))
        if highest < 0.99:
            name = self.recipe.one("schedule").name
            self.console.warn(
                f"in {steps:,} steps schedule {name!r} gets to {highest:.0%} of the learning rate:"
                " lower its warm-up for short runs"
            )

    def warm_start(
        self, built: BuiltModel, source: PretrainedEmbedding | None, corpus: Corpus
    ) -> dict[str, Any] | None:
        """Put pretrained word embeddings into the model, if the recipe asks for them; returns the
        record of it.
        """
        if source is None:
            return None
        require_agreement(self.world, {"embedding.warm_start": dict(source.facts)})
        moved = copy_rows(source, built.loss.decoder.vocabulary.table.weight, corpus.tokenizer)
        self.console.say(moved.text)
        return moved.record

    def build(
        self, built: BuiltModel, corpus: Corpus, store: Store, saved: Saved | None
    ) -> Trainer:
        """Give the model memory and put the run together."""
        mine = self.world.rows(self.recipe.train.batch_size)
        materialise(built.loss, self.recipe, self.world.device)
        optimizer = build_optimizer(self.recipe, self.registry, built.loss)
        groups = summarise_groups(optimizer.param_groups)
        self.console.table(("parameter group", "tensors", "parameters", "weight decay"), groups)
        baseline = unigram(self.recipe, corpus)
        resume_step = saved.step if saved is not None else None
        metrics = Metrics(
            self.metrics_path(),
            self.trackers(saved is not None),
            resume_step=resume_step,
            notice=self.console.warn,
        )
        return Trainer(
            Plan(
                recipe=self.recipe,
                setting=StepContext(
                    built.loss,
                    self.world,
                    self.precision,
                    self.recipe.train.seed,
                    mine,
                    self.micro_batch_size,
                    self.stopping,
                ),
                optimizer=optimizer,
                schedule=build_schedule(self.recipe, self.registry),
                rows=training_rows(self.recipe, corpus, mine, self.world.device),
                held_out=lambda: held_out(self.recipe, corpus, self.world, baseline),
                fingerprint=corpus.fingerprint(),
                components=self.components,
                store=store,
                metrics=metrics,
                console=self.console,
                stop=self.stop,
            )
        )

    def stopping(self) -> bool:
        """Polled inside of steps: several processes can only stop together, between them."""
        return self.world.size == 1 and self.stop()

    def metrics_path(self) -> Path:
        """The first process writes the run's metrics; what the others would write goes nowhere."""
        return self.directory / "metrics.jsonl" if self.world.rank == 0 else Path(os.devnull)

    def trackers(self, resumed: bool) -> list[Tracker]:
        """Where else metrics go."""
        if self.world.rank > 0:
            return []
        info = RunInfo(self.recipe.name, self.directory, self.recipe.resolved(), resumed)
        return [
            build_component(self.registry, chosen, info)
            for chosen in self.recipe.many("tracker").values()
        ]

    @property
    def records(self) -> Path:
        """Where everything is written that a number may depend on besides the recipe."""
        return self.directory / "environment.json"

    def write_records(
        self, built: BuiltModel, corpus: Corpus, warm_start: dict[str, Any] | None
    ) -> None:
        """The resolved recipe, and everything about this machine and text that a number may depend
        on.
        """
        if self.world.rank > 0:
            return
        own = {
            "command": self.command(),
            "started": self.began,
            "fingerprint": corpus.fingerprint(),
            "warm_start": warm_start,
        }
        found = own | environment(self.recipe, built, self.world, self.precision)
        write_atomically(self.directory / "recipe.toml", self.recipe.dump().encode())
        write_atomically(self.records, (json.dumps(found, indent=2) + "\n").encode())

    # ---------- end

    def conclude(self, trainer: Trainer, corpus: Corpus, seconds: float, steps: int) -> None:
        """A sample, the report, and what the full run would take at this speed."""
        if self.world.rank > 0:
            return
        with trainer.plan.optimizer.eval_parameters():
            self.sample(trainer, corpus)
        self.pictures()
        if steps and self.recipe.overlay is not None:
            rate = steps * self.recipe.train.tokens_per_step / seconds
            whole = self.full.train.total_steps * self.full.train.tokens_per_step
            self.console.say(
                f"at this speed ({rate:,.0f} tokens/s) the full run of {whole:,} tokens would take"
                f" {format_duration(whole / rate)} here"
            )
        self.console.say(f"done: {self.directory}")

    def sample(self, trainer: Trainer, corpus: Corpus) -> None:
        """Let the trained model write a little."""
        wanted = self.recipe.sample
        if not wanted.tokens:
            return
        prompt = (
            corpus.tokenizer.encode([wanted.prompt])[0]
            if wanted.prompt
            else corpus.valid.ids[1:PROMPT_TOKENS].tolist()
        )
        ids = generate(
            InferenceEngine(
                trainer.plan.setting.loss.decoder, self.precision, self.recipe.train.seq_len
            ),
            [corpus.tokenizer.bos_id, *prompt],
            Sample(wanted.temperature, wanted.top_p, seed=self.recipe.train.seed),
            max_new_tokens=wanted.tokens,
            eos_id=corpus.tokenizer.eos_id,
            should_stop=self.stop,
        )
        text = f"{corpus.tokenizer.decode(prompt)}⟦model⟧{corpus.tokenizer.decode(list(ids))}"
        write_atomically(self.directory / "sample.txt", (text + "\n").encode())
        self.console.say(
            "sample (the model writes after ⟦model⟧):\n"
            + "\n".join(f"  | {line}" for line in text.splitlines())
        )

    def pictures(self) -> None:
        """Curves and report of what has been logged so far."""
        if self.world.rank > 0:
            return
        if not read_metrics(self.directory / "metrics.jsonl"):
            return
        try:
            self.console.say(f"curves: {write_curves(self.directory)}")
        except ReportUnavailable as error:
            self.console.warn(str(error))
        self.console.say(f"report: {write_report(self.directory)}")

    def command(self, *more: str) -> str:
        """The command line of this run."""
        words = [
            "python",
            "-m",
            "lswt_core.run",
            str(self.arguments.recipe),
            *self.arguments.overrides,
        ]
        words += [word for file in self.arguments.plugin for word in ("--plugin", str(file))]
        words += ["--out", str(self.directory)] if self.arguments.out else []
        words += ["--full"] if self.arguments.full else []
        return shlex.join([*words, *more])


def sampled(steps: int) -> Iterator[int]:
    """Steps at which a schedule is looked at: the first thousand, and from there each a thousandth
    later than the one before.
    """
    step = 1
    while step < steps:
        yield step
        step += 1 + step // 1000
    yield steps
