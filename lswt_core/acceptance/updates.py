"""Checks of whole updates of a small model: compiled blocks, memories in host memory, sharding,
host waits, and checkpoints that are written in the background.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
import torch.distributed as dist

from lswt_core.acceptance.item import require
from lswt_core.acceptance.training import Training, require_close, small_recipe
from lswt_core.benchmark.step_profile import CompileCounts, profile_step
from lswt_core.checkpoint import Store
from lswt_core.checkpoint.pieces import piece_of
from lswt_core.checkpoint.train_state import model_tensors, optimizer_state
from lswt_core.device import pick_device
from lswt_core.distributed.world import World
from lswt_core.registry import Registry
from lswt_core.train.background_writer import BackgroundWriter, copy_to_host
from lswt_core.train.start import choose_sharding

STEPS = 3
ROUNDING = 2e-5  # of float32, over a few updates: sums in another order
BLOCK_GRAPHS, LOSS_GRAPHS = 2, 2  # empty and full memories; a whole chunk and a shorter one
# host waits of an update: losses' counts to the device, and the metrics from it
WAITS = 2
COMPILERS = ("g++", "clang++", "gcc", "clang")  # also Triton's launchers are compiled by one


def check_compiled() -> dict[str, Any]:
    """Compiled blocks give the losses of plain ones; graphs, breaks and recompilations."""
    if not any(map(shutil.which, COMPILERS)):
        raise SkipTest(f"torch.compile needs one of {', '.join(COMPILERS)}")
    world, registry = World(device=pick_device(0)), Registry()
    plain = Training.of(small_recipe(registry), world).advance(STEPS + 1)
    before = CompileCounts.now()
    compiled = Training.of(small_recipe(registry, compile="blocks"), world)
    compiled.advance(2)
    second = CompileCounts.now()
    error = require_close("losses", compiled.advance(STEPS - 1), plain, ROUNDING)
    graphs = second.graphs - before.graphs
    later = CompileCounts.now().graphs - second.graphs
    breaks = CompileCounts.now().breaks - before.breaks
    require(breaks == 0, f"{breaks} graph breaks")
    require(later == 0, f"{later} graphs were compiled after the second segment")
    allowed = BLOCK_GRAPHS + LOSS_GRAPHS
    require(0 < graphs <= allowed, f"{graphs} graphs, expected are 1 to {allowed}")
    return {"graphs": graphs, "graph_breaks": breaks, "recompiled_later": later, "error": error}


def check_host_memory() -> dict[str, Any]:
    """States and losses of ``train.memory_device = "host"`` are those of "device"."""
    world, registry = World(device=pick_device(0)), Registry()
    runs = {
        where: Training.of(small_recipe(registry, memory_device=where), world)
        for where in ("device", "host")
    }
    losses = {where: run.advance(STEPS) for where, run in runs.items()}
    device, host = (run.memories() for run in runs.values())
    require(len(device) == len(host) > 0, f"{len(host)} states instead of {len(device)}")
    placement = type(runs["host"].trainer.context.placement).__name__
    states = [require_close("states", a, b, ROUNDING) for a, b in zip(host, device, strict=True)]
    return {
        "loss_error": require_close("losses", losses["host"], losses["device"], ROUNDING),
        "state_error": max(states),
        "placement": placement,
    }


@contextmanager
def single_rank_mesh(device: torch.device) -> Iterator[World]:
    """A process group and a mesh of this process alone."""
    backend = "gloo" if device.type == "cpu" else None
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        names = ("replicas", "shards")
        mesh = dist.init_device_mesh(device.type, (1, 1), mesh_dim_names=names)
        yield World(device=device, mesh=mesh)
    finally:
        dist.destroy_process_group()


def check_mesh_of_one() -> dict[str, Any]:
    """Losses and weights of a model cut over a mesh of one are those of a whole model."""
    device, registry = pick_device(0), Registry()
    recipe = small_recipe(registry)
    plain = Training.of(recipe, World(device=device))
    expected = plain.advance(STEPS)
    with single_rank_mesh(device) as world:
        shard = choose_sharding(world, recipe, registry, plain.trainer.context.precision)
        sharded = Training.of(recipe, world, shard)
        error = require_close("losses", sharded.advance(STEPS), expected, ROUNDING)
        found = sharded.weights()
    weights = plain.weights()
    worst = max(require_close(name, found[name], weights[name], ROUNDING) for name in weights)
    return {"loss_error": error, "weight_error": worst}


def check_waits() -> dict[str, Any]:
    """How often the host waits for the device in an update."""
    world, registry = World(device=pick_device(0)), Registry()
    training = Training.of(small_recipe(registry), world)
    training.advance(STEPS)  # memories are full, and the first step's checks are over
    profile = profile_step(training.trainer.advance, world.device)
    statistics = len(training.trainer.optimizer.statistics())
    allowed = WAITS + statistics
    waits = profile.syncs
    require(waits is None or waits <= allowed, f"{waits} waits, expected are {allowed} at most")
    return {"waits": waits, "allowed": allowed, "peak_bytes": profile.peak_bytes}


def check_background_checkpoint() -> dict[str, Any]:
    """A checkpoint that is written while weights change is, byte for byte, one that was not."""
    training = Training.of(small_recipe(Registry()), World(device=pick_device(0)))
    training.advance(STEPS)
    moments, _ = optimizer_state(training.trainer.optimizer)
    groups = {
        group: {name: piece_of(tensor) for name, tensor in tensors.items()}
        for group, tensors in {"model": model_tensors(training.loss), "optimizer": moments}.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        stores = [Store(Path(folder) / name) for name in ("now", "later")]
        stores[0].save(STEPS, groups, {})
        writer = BackgroundWriter(lambda path: None)
        copied = copy_to_host(groups)
        writer.submit(lambda: stores[1].save(STEPS, copied, {}))
        training.advance(1)
        writer.wait()
        writer.close()
        written = [contents(store.path(STEPS)) for store in stores]
    different = [name for name, content in written[0].items() if content != written[1].get(name)]
    require(not different, f"{', '.join(different)} differ")
    return {"files": len(written[0]), "bytes": sum(map(len, written[0].values()))}


def contents(directory: Path) -> Mapping[str, bytes]:
    """The tensor files of a checkpoint."""
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}
