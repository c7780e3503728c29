"""The parts of a run's start: checkpoint to resume from, pretrained embeddings, metrics."""

from __future__ import annotations

import os
import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lswt_core.checkpoint import Saved, Store
from lswt_core.checkpoint.compatibility import check_code, check_recipe
from lswt_core.data.corpus import Corpus
from lswt_core.device import Precision
from lswt_core.distributed.sharding import Sharding
from lswt_core.distributed.world import World
from lswt_core.errors import CheckpointError, Incompatible
from lswt_core.interfaces import Optimizer, RunInfo, Tracker
from lswt_core.model.build import BuiltModel, materialise
from lswt_core.model.components import build_component, build_optimizer, optimizer_class
from lswt_core.model.decoder import Decoder
from lswt_core.model.embedding_init import PretrainedEmbedding, copy_rows
from lswt_core.model.parameters import build_parameter_groups, summarise_groups
from lswt_core.model.train_module import TrainModule
from lswt_core.recipe import Recipe
from lswt_core.recipe.schema import Train
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.train.agreement import require_agreement
from lswt_core.train.environment import is_intact
from lswt_core.train.memory_placement import MemoryPlacement, placement_on
from lswt_core.train.metrics import Metrics
from lswt_core.train.narrow_memory import NARROW, NarrowMemory
from lswt_core.train.step_context import StepContext


def choose_sharding(
    world: World, recipe: Recipe, registry: Registry, precision: Precision
) -> Callable[[nn.Module], None] | None:
    """What cuts a module's parameters over the ranks; None for a single process, which has them
    whole.
    """
    if world.mesh is None:
        return None
    gathered = torch.bfloat16 if precision.dtype == torch.bfloat16 else None
    if optimizer_class(recipe, registry).needs_hessian_vector_products:
        gathered = None  # differences of gradients drown in the rounding of bfloat16
    return Sharding(world.mesh, gathered).shard


def find_checkpoint(
    store: Store, recipe: Recipe, world: World, arguments: Namespace, console: Console
) -> Saved | None:
    """The checkpoint to resume from; None if the store is empty. Raises CheckpointError if none is
    intact, or if the recipe does not continue it.
    """
    saved = newest_checkpoint(store, world, console)
    if saved is None:
        if store.steps():
            raise CheckpointError(
                f"{store.directory} holds checkpoints, but none is intact (see above); nothing was"
                " changed\n  fix: restore one of them, or start another run with --out"
            )
        if arguments.resume:
            console.warn(
                f"{store.directory.parent} holds no checkpoint: starting from the beginning"
            )
        return None
    changes = check_recipe(saved, recipe.resolved(), accept_changes=arguments.accept_changes)
    for key, before, after in changes:
        console.warn(f"continuing with {key} = {after!r} instead of {before!r}")
    console.say(f"continuing from {saved.path}")
    return saved


def newest_checkpoint(store: Store, world: World, console: Console) -> Saved | None:
    """The newest checkpoint that verifies, the same on all ranks."""
    if world.size == 1:
        return store.newest(console.warn)
    from lswt_core.checkpoint.sharded import newest_together

    return newest_together(store, world, console.warn)


def check_component_code(
    saved: Saved, components: dict[str, dict[str, str]], arguments: Namespace, console: Console
) -> None:
    """Raise CheckpointError if the components' code is not that of the checkpoint."""
    for note in check_code(saved, components, accept_changes=arguments.accept_changes):
        console.warn(note)


def is_finished(saved: Saved, recipe: Recipe, report: Path, records: Path) -> bool:
    """Whether the last step is saved and evaluated, and report and records are complete."""
    if saved.step < recipe.train.total_steps:
        return False
    if saved.document("train")["evaluated"] != saved.step:
        return False
    return report.is_file() and report.stat().st_size > 0 and is_intact(records)


def warm_start(
    built: BuiltModel,
    embeddings: PretrainedEmbedding,
    corpus: Corpus,
    world: World,
    console: Console,
) -> dict[str, Any]:
    """Copy pretrained token embeddings into the model; returns a record of it."""
    require_agreement(world, {"embedding.warm_start": dict(embeddings.facts)})
    tables = built.loss.decoder.vocabulary.pretrained_tables()
    moved = [copy_rows(embeddings, table, corpus.tokenizer) for table in tables]
    if not moved:
        name = built.loss.decoder.vocabulary.name
        raise Incompatible(f"head {name!r} has no table that embedding.warm_start could fill")
    console.say(moved[0].text)
    return moved[0].record


def open_metrics(
    recipe: Recipe,
    registry: Registry,
    directory: Path,
    world: World,
    saved: Saved | None,
    console: Console,
) -> Metrics:
    """The run's metrics, continued after a checkpoint; only rank 0 writes and tracks them."""
    resume_step = None if saved is None else saved.step
    if world.rank > 0:
        return Metrics(Path(os.devnull), resume_step=resume_step, notice=console.warn)
    info = RunInfo(recipe.name, directory, recipe.resolved(), resumed=saved is not None)
    trackers: list[Tracker] = []
    for chosen in recipe.many("tracker").values():
        trackers.append(build_component(registry, chosen, info))
    path = directory / "metrics.jsonl"
    return Metrics(path, trackers, resume_step=resume_step, notice=console.warn)


def initial_optimizer(
    loss: TrainModule,
    recipe: Recipe,
    registry: Registry,
    device: torch.device,
    shard: Callable[[nn.Module], None] | None,
    console: Console,
) -> Optimizer:
    """Give the model its initial values, and build the optimizer over its parameter groups."""
    materialise(loss, recipe, device, shard)
    optimizer = build_optimizer(recipe, registry, loss)
    groups = summarise_groups(build_parameter_groups(loss, recipe.groups, loss.scalings))
    console.table(("parameter group", "tensors", "parameters", "weight decay"), groups)
    return optimizer


def step_context(
    built: BuiltModel,
    train: Train,
    world: World,
    precision: Precision,
    stopping: Callable[[], bool],
) -> StepContext:
    """What all steps share."""
    return StepContext(
        built.loss,
        world,
        precision,
        seed=train.seed,
        rows=world.rows(train.batch_size),
        micro_batch_size=world.micro_batch_size(train.batch_size, train.micro_batch_size),
        stopping=stopping,
        placement=place_memory(built.loss.decoder, train, world.device),
    )


def place_memory(decoder: Decoder, train: Train, device: torch.device) -> MemoryPlacement:
    """Where and in which type the memory states of a run are kept between passes."""
    placement = placement_on(train.memory_device, device)
    if train.memory_dtype == "auto":
        return placement
    return NarrowMemory(placement, decoder, NARROW[train.memory_dtype])


def run_command(arguments: Namespace, directory: Path, *more: str) -> str:
    """The command line that starts or resumes a run."""
    words = ["python", "-m", "lswt_core.run", str(arguments.recipe), *arguments.overrides]
    for file in arguments.plugin:
        words += ["--plugin", str(file)]
    if arguments.out:
        words += ["--out", str(directory)]
    words += ["--full"] if arguments.full else []
    words += ["--unchecked"] if arguments.unchecked else []
    return shlex.join([*words, *more])
