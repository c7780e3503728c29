"""``python -m lswt_core plan RECIPE``: parameters, memory, FLOPs and time of a recipe. Allocates
nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING, Any

from lswt_core.cli.common import next_commands, recipe_arguments, report_source, required_registry
from lswt_core.cli.plan_text import comparison, text
from lswt_core.cli.plan_time import PlannedRun, machine_of, placement_of, time_of
from lswt_core.errors import UsageError
from lswt_core.recipe import Recipe
from lswt_core.recipe.swap_syntax import overrides_of
from lswt_core.registry import Registry

if TYPE_CHECKING:
    import torch

    from lswt_core.budget import Budget
    from lswt_core.budget.flops import Flops
    from lswt_core.budget.memory import MemoryBudget
    from lswt_core.device import Precision
    from lswt_core.recipe.schema import Train


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    recipe_arguments(parser)
    parser.add_argument("--overlay", help="apply this overlay of the recipe, e.g. cpu")
    parser.add_argument(
        "--swap",
        action="append",
        default=[],
        metavar="AXIS=VALUE[,AXIS=VALUE]",
        help="show what a swap changes, e.g. ffn=gelu",
    )
    parser.add_argument(
        "--micro",
        type=int,
        metavar="N",
        help="rows run at a time (default: the recipe's train.micro_batch_size)",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16", "float16"),
        help="what is computed in (default: the recipe's)",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes that share the rows"
    )
    parser.add_argument(
        "--per-machine",
        type=int,
        metavar="N",
        help="processes on one machine (default: 8; all on a CPU)",
    )
    parser.add_argument(
        "--on",
        metavar="NAME",
        help="an accelerator from a data sheet, e.g. h100 (default: this machine, measured)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def plan(arguments: argparse.Namespace) -> int:
    """Print what a recipe would take; refuse nothing."""
    for name in ("ranks", "per_machine", "micro"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise UsageError(f"--{name.replace('_', '-')} {given}: give 1 or more")
    registry = required_registry(arguments)
    recipe = load(arguments, registry)
    estimate = measure(recipe, registry, arguments)
    estimate["swaps"] = {
        swap: measure(load(arguments, registry, swap), registry, arguments)
        for swap in arguments.swap
    }
    if arguments.json:
        print(json.dumps(estimate, indent=2))
        return 0
    print(text(estimate))
    if arguments.swap:
        print("\n" + comparison({"as it is": estimate} | estimate["swaps"]))
    words = shlex.join([str(arguments.recipe), *arguments.overrides])
    print(next_commands(f"lswt_core.run {words}"))
    return 0


def load(arguments: argparse.Namespace, registry: Registry, *swaps: str) -> Recipe:
    """Load the recipe with the overrides and swaps of the command line."""
    precision = arguments.precision or ("bfloat16" if arguments.on else None)
    overrides = [
        *arguments.overrides,
        *(override for swap in swaps for override in overrides_of(swap)),
        *([f"train.precision={precision}"] if precision else []),
    ]
    recipe = Recipe.load(arguments.recipe, overrides, overlay=arguments.overlay, registry=registry)
    if not swaps:
        report_source(recipe, arguments.recipe)
    return recipe


def measure(recipe: Recipe, registry: Registry, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return parameters, memory, FLOPs and time of a run, as plain data.

    "parameters" {total, active (those that a token uses), trainable, by_component,
    trainable_by_component}; "memory" of one process in bytes, by part, with its total, what is
    available and "largest_micro", the most rows that fit at a time; "mesh" {replicas, shards};
    "host", bytes of its memory {memories, checkpoint, total of a process, processes_per_machine,
    machine}; "fits", and if not "remedies", settings that would make it fit, the fastest first
    [{overrides, total, seconds_per_step}]; "flops" per token {forward, train, update_curvature,
    optimizer, conventional, six_n, forward_by_part}; "run" {steps, tokens_per_step, tokens,
    micro_batch_size, ranks}; "time" {tokens_per_second, seconds, machine ..., communication} as
    estimated; "device", "precision", "attention", and "unknown", what cannot be measured without
    numbers, and why: "flops" and "time" are then None, and parts of the memory are absent.
    """
    import torch

    from lswt_core.device import Precision

    run = planned_run(recipe, registry, arguments)
    taken, world, on = run.taken, run.world, arguments.on
    precision = Precision.choose(recipe.train.precision, world.device)
    length = {"micro_batch_size": run.micro, "ranks": world.size}
    return {
        "recipe": recipe.name,
        "overlay": recipe.overlay,
        "parameters": counts_of(taken),
        "memory": memory_of(run),
        **placement_of(run),
        "flops": taken.flops and work_of(taken.flops),
        "run": length_of(recipe.train) | length,
        "time": taken.flops and time_of(run),
        "unknown": taken.unknown,
        "device": str(world.device) if on is None else on,
        "precision": str(precision.dtype).removeprefix("torch."),
        "attention": attention_of(recipe, registry, on, world.device, precision),
        "torch": torch.__version__,
    }


def planned_run(recipe: Recipe, registry: Registry, arguments: argparse.Namespace) -> PlannedRun:
    """The run on the machines of the command line."""
    from lswt_core.budget import budget
    from lswt_core.device import available_memory
    from lswt_core.distributed.world import World

    device = World.read().device
    world = World(0, arguments.ranks, device)
    # all accelerators of the data sheets are torch's "cuda"
    taken = budget(recipe, registry, world, device_type="cuda" if arguments.on else None)
    free = available_memory(device)
    if not taken.memory.has_host:
        free //= world.size  # processes share the machine
    machine, train = machine_of(arguments.on, recipe, device, free), recipe.train
    micro = arguments.micro or world.micro_batch_size(train.batch_size, train.micro_batch_size)
    return PlannedRun(taken, registry, world, micro, machine, per_machine(arguments, taken.memory))


def memory_of(run: PlannedRun) -> dict[str, int]:
    """Bytes of one process by part, and the most rows that fit at a time."""
    memory, world, available = run.taken.memory, run.world, run.machine.memory
    largest = memory.largest_micro(world, available)
    needed = memory.of_process(world, run.micro)
    return needed | {"available": available, "largest_micro": largest}


def per_machine(arguments: argparse.Namespace, memory: MemoryBudget) -> int:
    """Processes on one machine: all of them on a CPU."""
    from lswt_core.budget.step_time import DEVICES_PER_MACHINE

    default = DEVICES_PER_MACHINE if memory.has_host else arguments.ranks
    return min(arguments.per_machine or default, arguments.ranks)


def counts_of(taken: Budget) -> dict[str, Any]:
    """Numbers of parameters as plain data."""
    return {
        "total": taken.total,
        "active": taken.active,
        "trainable": sum(taken.trainable.values()),
        "by_component": taken.parameters,
        "trainable_by_component": taken.trainable,
    }


def length_of(train: Train) -> dict[str, Any]:
    """Steps and tokens of a run as plain data."""
    return {
        "steps": train.total_steps,
        "tokens_per_step": train.tokens_per_step,
        "tokens": train.total_steps * train.tokens_per_step,
    }


def attention_of(
    recipe: Recipe, registry: Registry, on: str | None, device: torch.device, precision: Precision
) -> dict[str, Any]:
    """The attention backends that this machine would run, or the recipe's for another one."""
    if on is not None:
        names = dict.fromkeys(chosen.name for chosen in recipe.every("attention"))
        note = f"what 'auto' stands for is settled on the {on} itself"
        return {"backend": ", ".join(names), "notes": [note]}
    from lswt_core.model.attention_choice import choose_backends

    backends = choose_backends(recipe, registry, device, precision.dtype)
    return {"backend": ", ".join(backends.names), "notes": list(backends.notes)}


def work_of(flops: Flops) -> dict[str, Any]:
    """A token's floating-point operations as plain data."""
    return {
        "forward": sum(flops.forward.values()),
        "train": flops.train,
        "update_curvature": flops.update_curvature,
        "optimizer": flops.optimizer,
        "conventional": flops.conventional,
        "six_n": flops.six_n,
        "forward_by_part": flops.forward,
    }
