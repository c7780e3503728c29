"""``python -m lswt_core plan RECIPE``: what a recipe takes, in parameters, memory, work and time,
before anything is allocated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lswt_core.cli.common import recipe_arguments, required_registry
from lswt_core.errors import UsageError
from lswt_core.recipe import Recipe
from lswt_core.recipe.swap import override_of
from lswt_core.registry import Registry, nearest

if TYPE_CHECKING:
    from lswt_core.budget.flops import Flops

SHORT = 0.5  # seconds a micro-batch may be expected to take for it to be run
UNKNOWN = "unknown"
PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    recipe_arguments(parser)
    parser.add_argument("--overlay", help="apply this overlay of the recipe, e.g. cpu")
    parser.add_argument(
        "--swap",
        action="append",
        default=[],
        metavar="AXIS=VALUE",
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
        "--on",
        metavar="NAME",
        help="an accelerator from a data sheet, e.g. h100 (default: this machine, measured)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def plan(arguments: argparse.Namespace) -> int:
    """Show what a recipe would take; refuse nothing."""
    registry = required_registry(arguments)
    recipe = load(arguments, registry)
    found = measure(recipe, registry, arguments)
    found["swaps"] = {
        swap: measure(load(arguments, registry, swap), registry, arguments)
        for swap in arguments.swap
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    print(text(found))
    if arguments.swap:
        print("\n" + comparison({"as it is": found} | found["swaps"]))
    return 0


def load(arguments: argparse.Namespace, registry: Registry, *swaps: str) -> Recipe:
    """The recipe, with what the command line says."""
    precision = arguments.precision or ("bfloat16" if arguments.on else None)
    overrides = [
        *arguments.overrides,
        *map(override_of, swaps),
        *([f"train.precision={precision}"] if precision else []),
    ]
    return Recipe.load(arguments.recipe, overrides, overlay=arguments.overlay, registry=registry)


def measure(recipe: Recipe, registry: Registry, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything worth knowing before a run, as plain data.

    "parameters" {total, trainable, by_component, trainable_by_component}; "memory" of one process
    in bytes, by part, with its total, what is available and "largest_micro", the most rows that fit
    at a time; "flops" per token {forward, train, refresh, conventional, six_n, forward_by_part};
    "run" {steps, tokens_per_step, tokens}; "time" {tokens_per_second, seconds, machine ...} as
    estimated; "device", "precision", "attention", and "unknown", what cannot be measured without
    numbers, and why: "flops" and "time" are then None, and parts of the memory are absent.
    """
    import torch

    from lswt_core.budget import budget
    from lswt_core.device import Precision, available_memory
    from lswt_core.distributed.world import World
    from lswt_core.model.attention_choice import suitable_attention

    device = World.join().device
    world = World(0, arguments.ranks, device)
    precision = Precision.choose(recipe.train.precision, device)
    if arguments.on is None:
        backends = suitable_attention(recipe, registry, device, precision.dtype)
        attention = {"backend": ", ".join(backends.names), "notes": list(backends.notes)}
    else:
        asked = dict.fromkeys(chosen.name for chosen in recipe.every("attention"))
        attention = {
            "backend": ", ".join(asked),
            "notes": [f"what 'auto' stands for is settled on the {arguments.on} itself"],
        }
    taken = budget(recipe, registry, world)
    machine = machine_of(arguments.on, recipe, device, available_memory(device))
    train = recipe.train
    micro = arguments.micro or min(
        train.micro_batch_size or train.batch_size, len(world.rows(train.batch_size))
    )
    memory = taken.memory.of_process(world, micro) | {"available": machine.memory}
    return {
        "recipe": recipe.name,
        "overlay": recipe.overlay,
        "parameters": {
            "total": taken.total,
            "trainable": sum(taken.trainable.values()),
            "by_component": taken.parameters,
            "trainable_by_component": taken.trainable,
        },
        "memory": memory | {"largest_micro": taken.memory.largest_micro(world, machine.memory)},
        "flops": None if taken.flops is None else work_of(taken.flops),
        "run": {
            "steps": train.total_steps,
            "tokens_per_step": train.tokens_per_step,
            "tokens": train.total_steps * train.tokens_per_step,
            "micro_batch_size": micro,
            "ranks": arguments.ranks,
        },
        "time": (
            None if taken.flops is None else time_of(recipe, registry, taken, machine, world, micro)
        ),
        "unknown": taken.unknown,
        "device": str(device) if arguments.on is None else arguments.on,
        "precision": str(precision.dtype).removeprefix("torch."),
        "attention": attention,
        "torch": torch.__version__,
    }


def work_of(flops: Flops) -> dict[str, Any]:
    """A token's floating-point operations as plain data."""
    return {
        "forward": sum(flops.forward.values()),
        "train": flops.train,
        "refresh": flops.update_curvature,
        "conventional": flops.conventional,
        "six_n": flops.six_n,
        "forward_by_part": flops.forward,
    }


def machine_of(name: str | None, recipe: Recipe, device: Any, memory: int) -> Any:
    """The machine whose rates are used."""
    from lswt_core.budget.speed import ACCELERATORS, measure_machine

    if name is None:
        return measure_machine(recipe, device, memory)
    if name not in ACCELERATORS:
        guess = nearest(name, list(ACCELERATORS))
        raise UsageError(
            f"--on {name}: known are {', '.join(ACCELERATORS)}"
            + (f"; did you mean {guess}?" if guess else "")
        )
    return ACCELERATORS[name]


def time_of(
    recipe: Recipe, registry: Registry, taken: Any, machine: Any, world: Any, micro: int
) -> dict[str, Any]:
    """The estimated time of the run, on machines of one kind that are taken to share the work
    without loss.

    A model whose micro-batch takes this machine about a second or less is run for a moment; for
    others work is divided by rates.
    """
    from lswt_core.budget.speed import measured_tokens_per_second, tokens_per_second

    train = recipe.train
    rate, source = (
        tokens_per_second(recipe, taken.flops_per_token, taken.total, machine),
        machine.source,
    )
    fits = taken.memory.of_process(world._replace(size=1), micro)["total"] < machine.memory
    if machine.name == str(world.device) and fits and micro * train.seq_len / rate < SHORT:
        rate, source = (
            measured_tokens_per_second(recipe, registry, world, taken.flops, micro),
            "a few micro-batches run just now",
        )
    return {
        "tokens_per_second": rate * world.size,
        "seconds": train.total_steps * train.tokens_per_step / rate / world.size,
        "machine": machine.name,
        "flops_per_second": machine.flops,
        "assumed_efficiency": machine.efficiency,
        "bytes_per_second": machine.bandwidth,
        "source": source,
    }


def text(found: Mapping[str, Any]) -> str:
    """A plan for people."""
    run = found["run"]
    head = (
        f"{found['recipe']} on {found['device']}, {found['precision']}, attention"
        f" {found['attention']['backend']}"
    )
    sections = [
        [head],
        ["parameters", *parameter_lines(found["parameters"])],
        [
            f"memory of one process, {run['micro_batch_size']} rows at a time",
            *memory_lines(found["memory"]),
        ],
        [
            "work of a token",
            *(work_lines(found["flops"]) if found["flops"] else [line("training", UNKNOWN)]),
        ],
        ["run", *run_lines(run, found["time"])],
    ]
    sections += (
        [[UNKNOWN, *(f"  {what}: {why}" for what, why in found["unknown"].items())]]
        if found["unknown"]
        else []
    )
    return "\n\n".join("\n".join(lines) for lines in sections)


def line(name: str, value: str, note: str = "") -> str:
    """A row of two columns and a remark."""
    return f"  {name:<28}{value:>20}{f'  {note}' if note else ''}"


def parameter_lines(numbers: Mapping[str, Any]) -> list[str]:
    """Numbers of parameters."""
    trained = numbers["trainable_by_component"]
    rows = [
        line(name, f"{n:,}", "" if trained[name] == n else "not trained")
        for name, n in numbers["by_component"].items()
    ]
    return [
        *rows,
        line("total", f"{numbers['total']:,}"),
        line("trainable", f"{numbers['trainable']:,}"),
    ]


def memory_lines(need: Mapping[str, int]) -> list[str]:
    """Bytes, and what to do if they are too many."""
    from lswt_core.budget.memory import advice
    from lswt_core.reporting.console import gigabytes

    rows = [line(name, gigabytes(size)) for name, size in need.items() if name != "largest_micro"]
    if need["total"] > need["available"]:
        largest = need["largest_micro"]
        verdict = f"does not fit: micro-batch <= {largest}" if largest else "does not fit"
        rows.append(f"  {verdict}; {advice(largest)}")
    return rows


def work_lines(work: Mapping[str, Any]) -> list[str]:
    """Floating-point operations."""
    rows = [
        line(f"forward: {part}", flop(number)) for part, number in work["forward_by_part"].items()
    ]
    rows += [
        line("forward", flop(work["forward"])),
        line("training", flop(work["train"]), "forward and backward, no more than needed"),
    ]
    if work["refresh"]:
        rows.append(
            line("curvature", flop(work["refresh"]), "the optimizer's, spread over its steps")
        )
    conventional = line("3 x forward", flop(work["conventional"]), "as papers count")
    return [
        *rows,
        conventional,
        line("6 N", flop(work["six_n"]), "as scaling laws count, N without the embedding table"),
    ]


def run_lines(run: Mapping[str, Any], taken: Mapping[str, Any] | None) -> list[str]:
    """Length and time."""
    from lswt_core.reporting.console import duration

    length = (
        f"{run['steps']:,} steps of {run['tokens_per_step']:,} tokens = {run['tokens']:,} tokens"
    )
    if taken is None:
        return [f"  {length}", f"  estimated: {UNKNOWN}"]
    share = (
        f", {taken['assumed_efficiency']:.0%} of it assumed"
        if taken["assumed_efficiency"] < 1
        else ""
    )
    basis = (
        f"{taken['source']}; {flop(taken['flops_per_second'])}/s{share},"
        f" {unit(taken['bytes_per_second'])}B/s"
    )
    processes = f" and {run['ranks']} processes" if run["ranks"] > 1 else ""
    estimate = (
        f"estimated: {taken['tokens_per_second']:,.0f} tokens/s, {duration(taken['seconds'])} on"
        f" {taken['machine']}{processes}"
    )
    return [f"  {length}", f"  {estimate}", f"  from {basis}"]


def comparison(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """What swaps change, beside the recipe as it is."""
    from lswt_core.reporting.console import gigabytes

    base = next(iter(plans.values()))
    columns: dict[str, tuple[Callable[[Any], float | None], Callable[[float], str]]] = {
        "parameters": (lambda plan: plan["parameters"]["total"], lambda n: f"{n:,}"),
        "training/token": (
            lambda plan: plan["flops"] and plan["flops"]["train"] + plan["flops"]["refresh"],
            flop,
        ),
        "memory": (lambda plan: plan["memory"]["total"], gigabytes),
        "tokens/s (est.)": (
            lambda plan: plan["time"] and plan["time"]["tokens_per_second"],
            lambda n: f"{n:,.0f}",
        ),
    }
    rows = [["", *(word for name in columns for word in (name, ""))]]
    for name, found in plans.items():
        rows.append([name])
        for value, show in columns.values():
            own, before = value(found), value(base)
            change = (
                "" if found is base or own is None or before is None else f"{own / before - 1:+.1%}"
            )
            rows[-1] += [UNKNOWN if own is None else show(own), change]
    return "\n".join(table_line(row, rows) for row in rows)


def table_line(row: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A row of a table whose first column is text."""
    widths = [max(len(other[i]) for other in rows) for i in range(len(row))]
    cells = (
        f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join(cells).rstrip()


def flop(number: float) -> str:
    """An amount of work."""
    return f"{unit(number)}FLOP"


def unit(number: float) -> str:
    """A number with a metric prefix."""
    power = 0
    while number >= 1000 and power < len(PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {PREFIXES[power]}"
