"""Times updates of two recipes side by side: ``python -m lswt_core.ablation.runs.time_steps
BASELINE ARM``. Prints seconds per update, by round, as JSON.

Rounds alternate in their order, so that changes of the machine affect both alike. A round is as
many updates as lie between two Hessian estimates, or MIN_UPDATES.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from lswt_core.device import Precision, configure_process
from lswt_core.distributed.world import World
from lswt_core.interfaces import Batch
from lswt_core.model.build import build_model
from lswt_core.model.components import build_schedule
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.reporting.exit_status import run_guarded
from lswt_core.train.averaging import average_weights
from lswt_core.train.start import initial_optimizer, step_context
from lswt_core.train.trainer import Trainer, TrainerComponents

MIN_UPDATES = 4  # of a round
ROUNDS = 8
ENDLESS = "train.steps=1000000"


class RandomBatches:
    """A stream of one batch of random tokens (implements ``data.BatchStream``)."""

    def __init__(self, recipe: Recipe, lookahead: int) -> None:
        generator = torch.Generator().manual_seed(0)
        train, vocab_size = recipe.train, recipe.embedding.vocab_size
        shape = (train.batch_size, train.seq_len + 1 + lookahead)
        ids = torch.randint(vocab_size, shape, generator=generator)
        length = train.seq_len
        ahead = ids[:, length + 1 :] if lookahead else None
        self.batch = Batch(ids[:, :length], ids[:, 1 : length + 1], labels_ahead=ahead)

    def segment(self, ahead: int = 0) -> Batch:
        """Return the batch."""
        return self.batch

    def advance(self) -> None:
        """Stay."""


class NoMetrics:
    """Keeps no metrics (implements ``train.metrics.MetricsSink``)."""

    def log(self, step: int, values: Any) -> None:
        """Log nothing."""


class Timed:
    """A recipe's trainer, which can be timed."""

    def __init__(self, recipe: Recipe, registry: Registry, world: World) -> None:
        self.device = world.device
        precision, console = Precision.choose(recipe.train.precision, world.device), Console()
        console.silent = True
        built = build_model(recipe, registry, device=world.device, dtype=precision.dtype)
        context = step_context(built, recipe.train, world, precision, lambda: False)
        optimizer = initial_optimizer(built.loss, recipe, registry, world.device, None, console)
        batches = RandomBatches(recipe, context.loss.lookahead)
        schedule = build_schedule(recipe, registry)
        average = average_weights(recipe, registry, context.loss, optimizer)
        parts = (recipe.train, context, optimizer, schedule, batches, NoMetrics(), console)
        self.trainer = Trainer(TrainerComponents(*parts, average))
        self.updates = max(MIN_UPDATES, optimizer.hessian_update_interval)

    def time(self) -> float:
        """Return the seconds per update of a round."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(self.updates):
            self.trainer.advance()
        self.synchronize()
        return (time.perf_counter() - began) / self.updates

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def measure(contenders: list[Timed], rounds: int) -> list[list[float]]:
    """Return seconds per update by contender and round; the first round, in which memories are cold
    and kernels are built, is left out.
    """
    taken: list[list[float]] = [[] for _ in contenders]
    for number in range(rounds + 1):
        order = list(range(len(contenders)))
        for index in order[::-1] if number % 2 else order:
            seconds = contenders[index].time()
            if number:
                taken[index].append(seconds)
    return taken


def work(arguments: argparse.Namespace) -> int:
    """Time both recipes and print the result."""
    configure_process()
    registry, world = Registry(files=arguments.plugin), World.read()
    # a schedule is not asked for steps that a short run does not have
    recipes = [Recipe.load(path, [ENDLESS], registry=registry) for path in arguments.recipes]
    contenders = [Timed(recipe, registry, world) for recipe in recipes]
    print(json.dumps(measure(contenders, arguments.rounds)))
    return 0


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs=2, type=Path, metavar="RECIPE")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--plugin", action="append", default=[], type=Path, metavar="FILE")
    return run_guarded(work, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
