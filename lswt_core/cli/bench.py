"""``python -m lswt_core bench RECIPE``: throughput of training, evaluation and decoding, against
other recipes and libraries. ``bench --acceptance`` is another command (``bench_acceptance``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lswt_core.cli.bench_acceptance import (
    accept,
    acceptance_arguments,
    refuse_without_acceptance,
)
from lswt_core.cli.common import recipe_arguments, report_source, required_registry
from lswt_core.errors import UsageError
from lswt_core.recipe import Recipe
from lswt_core.recipe.packaged import SUFFIX, is_qualified
from lswt_core.recipe.swap_syntax import overrides_of
from lswt_core.registry import Registry

if TYPE_CHECKING:
    import torch

# what all peers do: AdamW, from scratch
PEERS_WORK = ["optimizer.use=adamw", "optimizer.lr=3e-4", "embedding.warm_start=none"]


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    recipe_arguments(parser)
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="RECIPE|PEER",
        help="compare with another recipe or library",
    )
    parser.add_argument(
        "--swap",
        action="append",
        default=[],
        metavar="AXIS=VALUE[,AXIS=VALUE]",
        help="compare with a swap, e.g. ffn=gelu",
    )
    parser.add_argument(
        "--full", action="store_true", help="ignore the recipe's overlay for this device"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        metavar="N",
        help="training steps of each, taken in turn (default: 7)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=32,
        metavar="N",
        help="tokens decoded by each, in turn (default: 32)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    acceptance_arguments(parser)


def bench(arguments: argparse.Namespace) -> int:
    """Measure, and print the results."""
    if arguments.acceptance:
        return accept(arguments)
    refuse_without_acceptance(arguments)
    if arguments.rounds < 1 or arguments.tokens < 1:
        raise UsageError("--rounds and --tokens must be at least 1")
    report = measure(
        arguments,
        required_registry(arguments),
        say=lambda text: print(f"... {text}", file=sys.stderr, flush=True),
    )
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        from lswt_core.benchmark.text_report import format_report

        print(format_report(report))
    return 0


def measure(
    arguments: argparse.Namespace, registry: Registry, say: Callable[[str], None]
) -> dict[str, Any]:
    """Everything as plain data.

    "work" (the sizes), "machine", "contenders" by name: "training", "evaluation" and "decoding"
    {seconds {median, min, max}, tokens_per_second, times_as_long {...} relative to the contender
    named "baseline"}, parameters, held_bytes, step_peak_bytes, syncs_per_step, first_step_seconds,
    compiled_graphs, graph_breaks, recompiled_later, loss after so many steps of the same text; of
    the recipe itself "ceilings", "utilisation" {necessary, conventional, six_n} of them,
    "data_sheet" {flops_per_second, source, necessary, conventional, six_n} (None if no data sheet
    is known) and "breakdown".
    """
    from lswt_core.benchmark.runner import Benchmark, Rounds, analyse_step
    from lswt_core.budget import budget
    from lswt_core.device import configure_process
    from lswt_core.distributed.world import World

    world = World.read()
    configure_process()
    recipes = chosen_recipes(arguments, registry, None if arguments.full else world.device.type)
    first = next(iter(recipes.values()))
    subjects = contenders(arguments, recipes, registry, world.device)
    ours = next(iter(subjects.values()))
    rounds = Rounds(arguments.rounds, arguments.rounds, arguments.tokens)
    rows = Benchmark(ours.work, subjects, rounds, say).run()
    say("ceilings and breakdown")
    taken = rows[ours.name]["training"]["seconds"]["median"]
    return {
        "recipe": first.name,
        "work": {
            key: value
            for key, value in ours.work._asdict().items()
            if key not in ("precision", "device")
        },
        "machine": machine(ours.work, ours.attention),
        "contenders": rows,
        **analyse_step(ours, budget(first, registry, world), taken),
    }


def contenders(
    arguments: argparse.Namespace,
    recipes: Mapping[str, Recipe],
    registry: Registry,
    device: torch.device,
) -> dict[str, Any]:
    """Recipes and peers by name, the recipe itself first, all with as many tokens a step."""
    from lswt_core.benchmark.ours import Ours, work_of

    subjects: dict[str, Any] = {
        name: Ours(work_of(recipe, registry, device), recipe, registry, name)
        for name, recipe in recipes.items()
    }
    first, *_ = ours = list(subjects.values())
    for name in arguments.against:
        if not is_recipe(name):
            subjects[name] = peer(name, first.work, ours)
    for name, subject in subjects.items():
        if subject.work.tokens != first.work.tokens:
            raise UsageError(
                f"{name} reads {subject.work.tokens} tokens a step, {first.name}"
                f" {first.work.tokens}: give both the same train keys"
            )
    return subjects


def chosen_recipes(
    arguments: argparse.Namespace, registry: Registry, device: str | None
) -> dict[str, Recipe]:
    """Load the recipe, its swaps, other recipes and, if peers take part, the recipe with the work
    that they do: without what they lack, and with word embeddings as wide as the model.
    """

    def load(path: Path, *more: str) -> Recipe:
        recipe = Recipe.load(path, [*arguments.overrides, *more], registry=registry)
        return recipe.with_overlay(device)

    base = load(arguments.recipe)
    report_source(base, arguments.recipe)
    recipes = {base.name: base}
    for swap in arguments.swap:
        recipes[f"{base.name} {swap}"] = load(arguments.recipe, *overrides_of(swap))
    for other in arguments.against:
        if is_recipe(other):
            recipes[other] = load(Path(other))
    peers = [name for name in arguments.against if not is_recipe(name)]
    if peers:
        work = [*PEERS_WORK, *(f"loss.{name}=false" for name in base.many("loss"))]
        work.append(f"embedding.d_vocab={base.model.d_model}")
        recipes[f"{base.name}, peers' work"] = load(arguments.recipe, *work)
        if base.many("memory") and any(not remembers(name) for name in peers):
            bare = [f"memory.{name}=false" for name in base.many("memory")]
            recipes[f"{base.name}, peers' work, no memory"] = load(arguments.recipe, *work, *bare)
    return recipes


def is_recipe(name: str) -> bool:
    """Whether an argument of --against is a recipe (a .toml file or PACKAGE:NAME) or a peer."""
    return name.endswith(SUFFIX) or is_qualified(name)


def remembers(name: str) -> bool:
    """Whether a peer attends to earlier segments (has a memory)."""
    from lswt_core.benchmark.peers import ORIGINALS, find_peer

    return name in ORIGINALS or find_peer(name).has_memory


def peer(name: str, work: Any, ours: list[Any]) -> Any:
    """A peer, built at the work's sizes."""
    from lswt_core.benchmark import original, peers

    kinds = {"original": original.OriginalCode, "original-float32": original.OriginalFloat32}
    if name in kinds:
        return original.build_original(
            kinds[name], work, next(subject for subject in reversed(ours) if subject.has_memory)
        )
    return peers.find_peer(name)(work)


def machine(work: Any, attention: str) -> Mapping[str, Any]:
    """The machine of the measurement."""
    import platform

    import torch

    from lswt_core.device import device_name

    return {
        "device": device_name(work.device) or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "precision": str(work.precision.dtype).removeprefix("torch."),
        "attention": attention,
        "torch": torch.__version__,
    }
