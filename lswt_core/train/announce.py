"""What a run prints before its first step: recipe, model, device, memory and disk needs."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lswt_core.budget import budget
from lswt_core.budget.memory import MemoryBudget, require_host_memory, require_memory
from lswt_core.device import Precision, available_memory
from lswt_core.distributed.world import World
from lswt_core.interfaces import Schedule
from lswt_core.model.build import BuiltModel
from lswt_core.model.parameters import count_parameters
from lswt_core.recipe import Recipe
from lswt_core.recipe.layer_selectors import LAYERS
from lswt_core.recipe.toml_writer import flat
from lswt_core.registry import Registry
from lswt_core.reporting.console import Console
from lswt_core.reporting.tables import LINE_WIDTH
from lswt_core.reporting.units import format_bytes

SINGLE_KINDS = (
    "head",
    "block",
    "mixer",
    "positional",
    "attention",
    "qk_norm",
    "ffn",
    "norm",
    "parametrisation",
    "cross_entropy",
    "optimizer",
    "average",
    "schedule",
    "data",
    "tokenizer",
)
STACKED_KINDS = ("memory", "loss")
LOW_PEAK = 0.99  # of the learning rate: a schedule that never reaches it is reported


def announce_recipe(console: Console, recipe: Recipe) -> None:
    """Print the components and the length of a run."""
    names = [f"{kind}={recipe.one(kind).name}" for kind in SINGLE_KINDS]
    for kind in STACKED_KINDS:
        stacked = ", ".join(chosen.name for chosen in recipe.many(kind).values())
        names.append(f"{kind}={stacked or '-'}")
    for line in pack_lines(names):
        console.say(line)
    for layers, tables in recipe.resolved().get(LAYERS, {}).items():
        changed = "  ".join(f"{key}={value}" for key, value in flat(tables).items())
        console.say(f"  layers {layers}: {changed}")
    train = recipe.train
    console.say(
        f"{train.total_steps:,} steps of {train.batch_size} rows x {train.seq_len} tokens ="
        f" {train.total_steps * train.tokens_per_step:,} tokens"
    )


def pack_lines(items: Sequence[str]) -> list[str]:
    """Join items, two spaces apart, into lines of up to LINE_WIDTH columns."""
    lines = [items[0]]
    for item in items[1:]:
        longer = f"{lines[-1]}  {item}"
        if len(longer) <= LINE_WIDTH:
            lines[-1] = longer
        else:
            lines.append(item)
    return lines


def announce_overlay(console: Console, recipe: Recipe, full: Recipe, device: torch.device) -> None:
    """Print what a device overlay changes, compared with the full run."""
    if recipe.overlay is None:
        return
    why = f"The device is {device}"
    if recipe.overlay == "cpu":
        why = "No accelerator was found"
    lines = [
        f"{why}: the recipe's [{recipe.overlay}] overlay applies.",
        (
            f"The full run: {full.train.total_steps:,} steps of {full.train.tokens_per_step:,}"
            " tokens. --full forces it here."
        ),
    ]
    for key, before, after in recipe.changes():
        lines.append(f"  {key} = {after!r}  (full: {before!r})")
    console.banner(lines)


def announce_model(console: Console, built: BuiltModel, world: World, precision: Precision) -> None:
    """Print parameters by component, device, precision and attention backend."""
    numbers = count_parameters(built.loss)
    rows = list(numbers["by_component"].items())
    rows += [("total", numbers["total"]), ("trainable", numbers["trainable"])]
    console.table(("component", "parameters"), rows)
    device = f"device {world.device}"
    if world.device.type == "cpu":
        device += f", {torch.get_num_threads()} threads"
    if world.size > 1:
        device += f", {world.size} processes"
    console.say(device)
    console.say(f"precision {precision.dtype} ({precision.why})".replace("torch.", ""))
    notes = ""
    if built.notes:
        notes = f" ({'; '.join(built.notes)})"
    console.say(f"attention {built.attention}{notes}")


def announce_needs(
    console: Console, recipe: Recipe, registry: Registry, world: World, directory: Path
) -> None:
    """Print the memory and disk that a run needs and what is free. Raises ResourceError if the
    model does not fit into memory.
    """
    taken = budget(recipe, registry, world)
    needs = taken.memory.of_process(world)
    # collective: no rank allocates anything before all have seen what is free
    neighbours = ranks_of_machine(world)
    require_on_host(taken.memory, world, neighbours, recipe.name)
    each = ""
    if world.device.type == "cpu" and neighbours > 1:
        needs["available"] //= neighbours
        each = f" for each of {neighbours} processes on this machine"
    at_least = "about"
    if taken.unknown:
        at_least = "at least"
    console.say(
        f"memory: {at_least} {format_bytes(needs['total'])} needed,"
        f" {format_bytes(needs['available'])} free{each}"
    )
    for what, why in taken.unknown.items():
        console.say(f"unknown: {what} ({why})")
    largest = taken.memory.largest_micro(world, needs["available"])
    require_memory(needs, world.device, recipe.name, largest)
    announce_disk(console, taken.memory.checkpoint_bytes(), recipe.checkpoint.keep, directory)


def ranks_of_machine(world: World) -> int:
    """How many of a run's processes are on this machine. A collective of all ranks."""
    machine = platform.node()
    return world.gather_texts(machine).count(machine)


def require_on_host(memory: MemoryBudget, world: World, neighbours: int, name: str) -> None:
    """Raise ResourceError if what the processes of this machine keep on the host does not fit."""
    needed = neighbours * memory.of_host(world)["total"]
    if needed:
        require_host_memory(needed, available_memory(torch.device("cpu")), name)


def announce_disk(console: Console, size: int, keep: int, directory: Path) -> None:
    """Print the disk that checkpoints of ``size`` bytes need; one more than ``keep`` exists while
    one is saved. A warning if less is free.
    """
    needed, free = (keep + 1) * size, shutil.disk_usage(directory).free
    text = (
        f"checkpoints: about {format_bytes(size)} each, {keep} kept, up to {format_bytes(needed)}"
        f" while saving; {format_bytes(free)} free"
    )
    if needed <= free:
        console.say(text)
    else:
        console.warn(f"{text}: make room, or choose another --out")


def warn_of_short_schedule(console: Console, schedule: Schedule, recipe: Recipe) -> None:
    """Warn if the run ends before its schedule reaches the peak learning rate."""
    steps = recipe.train.total_steps
    highest = max(schedule.factor(step) for step in probe_steps(steps))
    if highest < LOW_PEAK:
        name = recipe.one("schedule").name
        console.warn(
            f"in {steps:,} steps schedule {name!r} gets to {highest:.0%} of the learning rate:"
            " lower its warm-up for short runs"
        )


def probe_steps(steps: int) -> Iterator[int]:
    """Steps to evaluate a schedule at: the first thousand, then geometrically by a thousandth, and
    the last.
    """
    step = 1
    while step < steps:
        yield step
        step += 1 + step // 1000
    yield steps
