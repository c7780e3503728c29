"""``python -m lswt_core ablate RECIPE --swap ffn=gelu --seeds 5``: is a component worth it? Arms
that differ from a baseline in one thing, several seeds each, and an honest report.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lswt_core.ablation.arms import (
    COMMAND_LINE,
    AblationFile,
    ArmSpec,
    arms_of_file,
    arms_of_recipes,
    lay_out_arms,
    list_swaps,
    read_ablation_file,
    require_arms,
)
from lswt_core.ablation.tuning_grid import parse_tune
from lswt_core.cli.ablate_command_line import after_dry_run, words_of
from lswt_core.cli.ablate_ladder import ablate_ladder, find_ladder
from lswt_core.cli.common import report_source, required_registry
from lswt_core.cli.third_party_checks import check_plugins
from lswt_core.errors import PluginError, RunsFailed, UsageError
from lswt_core.plugin_api.atomic_write import make_output_directory
from lswt_core.recipe import Recipe
from lswt_core.recipe.loader import find

if TYPE_CHECKING:
    from lswt_core.ablation.run_ladder import LadderStudy
    from lswt_core.ablation.runs.outcome import Study
    from lswt_core.ablation.runs.runner import Workers
    from lswt_core.ablation.study import Ablation

SEQUENTIAL_LOOKS = (5, 10, 20)  # default


def ablate(arguments: argparse.Namespace) -> int:
    """Certify the arms, make the runs, write the report."""
    ladder = find_ladder(arguments)
    ablation, baseline = planned_ablation(arguments)
    if ladder is not None:
        made = ablate_ladder(arguments, ablation, ladder, workers_of(arguments), say)
        return 0 if made is None else finish_ladder(*made)
    spec = ablation.spec
    ablation.build(baseline)
    check_plugins(arguments, [arm.recipe for arm in ablation.arms], ablation.registry, say)
    from lswt_core.ablation.comparison import (
        Comparison,
        check_comparison,
        describe_plan,
        run_comparison,
    )

    check_comparison(ablation)
    say("\n".join([ablation.describe_arms(), *describe_plan(ablation)]))
    if arguments.dry_run:
        say(after_dry_run(arguments))
        return 0
    from lswt_core.ablation.report.publish import claim, publish
    from lswt_core.ablation.runs.runner import RunsStopped
    from lswt_core.ablation.runs.store import RunStore
    from lswt_core.ablation.study import require_certified

    directory = arguments.out or Path("runs/ablations") / f"{spec.name}-{spec.fingerprint()}"
    claim(directory, spec.fingerprint())
    make_output_directory(arguments.store, "--store")
    try:
        comparison = run_comparison(ablation, RunStore(arguments.store), workers_of(arguments))
    except RunsStopped as stopped:
        if stopped.study is not None:
            publish(Comparison(stopped.study), directory)
            say(f"report of what is finished, without verdicts: {directory / 'report.html'}")
        raise
    print(publish(comparison, directory))
    for study in comparison.studies():
        require_certified(study)
    refuse_failed(comparison.studies(), directory)
    print(f"next:\n  open {directory / 'report.html'}")
    return 0


def finish_ladder(study: LadderStudy, directory: Path) -> int:
    """Return the exit code of a ladder whose report is written; raises Uncertified or RunsFailed
    for what it says of the runs.
    """
    from lswt_core.ablation.study import require_certified

    for one in study.studies():
        require_certified(one)
    refuse_failed(study.studies(), directory)
    print(f"next:\n  open {directory / 'report.html'}")
    return 0


def planned_ablation(arguments: argparse.Namespace) -> tuple[Ablation, Recipe]:
    """The ablation of the command line, nothing of which is built, and its baseline."""
    name, variants, settings = read_arms(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "ablate starts its runs itself: start it without torchrun, with --devices 0,1,... for"
            " several accelerators"
        )
    require_libraries()
    from lswt_core.ablation.build_arms import AblationSpec
    from lswt_core.ablation.study import Ablation, format_command
    from lswt_core.distributed.world import World

    registry, world = required_registry(arguments), World.read()
    recipe = Recipe.load(variants[0].path, variants[0].overrides, registry=registry)
    report_source(recipe, variants[0].path)
    overlay = None
    if not arguments.full and world.device.type in recipe.overlays:
        overlay = world.device.type
    spec = AblationSpec(
        name,
        variants,
        **settings,
        knob=arguments.knob,
        overlay=overlay,
        command=format_command(words_of(arguments)),
        threads=workers_of(arguments).threads,
        plugins=arguments.plugin,
    )
    return Ablation(spec, registry, world, say), recipe.with_overlay(overlay)


def workers_of(arguments: argparse.Namespace) -> Workers:
    """How many runs are made at once, and on which devices."""
    from lswt_core.ablation.runs.launcher import parse_launcher
    from lswt_core.ablation.runs.runner import Workers

    devices = arguments.devices.split(",") if arguments.devices else []
    at_once = arguments.jobs or len(devices) or 1
    launcher = parse_launcher(arguments.launcher)
    own_threads = threads(1 if launcher else at_once)
    return Workers(at_once, own_threads, devices, arguments.plugin, arguments.unchecked, launcher)


def refuse_failed(studies: Sequence[Study], directory: Path) -> None:
    """Raise RunsFailed if runs failed; the report is written, and says which. A run of tuning that
    failed is a result.
    """
    outcomes = [one for study in studies for arm in study.arms for one in arm.outcomes]
    failed = sum(one.failure is not None for one in outcomes)
    if failed:
        raise RunsFailed(
            f"{failed} of {len(outcomes)} runs failed; {directory / 'report.md'} says which, and"
            " why\n  fix: the same command makes those again that did not diverge"
        )


def read_arms(arguments: argparse.Namespace) -> tuple[str, list[ArmSpec], dict[str, Any]]:
    """The ablation's name, its baseline and arms, and how they are to be compared."""
    read = read_ablation_file(arguments.recipe)
    file = read[0] if read is not None else None
    path = arguments.recipe if read is None else find(read[0].recipe, read[1].path.parent)
    overrides = (*(file.set if file else ()), *arguments.overrides)
    swaps = [*(list_swaps(file.swap) if file else ()), *arguments.swap]
    layout = arguments.plan or (file.plan if file else "one-at-a-time")
    arms = lay_out_arms(
        layout, path, swaps, overrides, COMMAND_LINE if read is None else read[1].shown
    )
    arms += [
        *(arms_of_file(*read) if read is not None else ()),
        *arms_of_recipes(arguments.arm, overrides),
    ]
    looks = planned_looks(arguments, file)
    settings = {
        "seeds": first(arguments.seeds, looks[0] if looks else None, file and file.seeds, 5),
        "looks": looks,
        "sequential": arguments.sequential or bool(file and file.sequential),
        "match": first(arguments.match, file and file.match, "none"),
        "margin": first(arguments.margin, file and file.margin, 0.01),
        "allow": [*(file.allow if file else ()), *arguments.allow],
        "probes": tuple(dict.fromkeys([*(file.probe if file else ()), *arguments.probe])),
        **read_tuning(arguments, file),
    }
    if min(settings["seeds"], settings["tuning_seeds"]) < 1 or settings["margin"] <= 0:
        raise UsageError("--seeds and --tuning-seeds are at least 1, and --margin greater than 0")
    return find(arguments.recipe).stem, require_arms(arms), settings


def read_tuning(arguments: argparse.Namespace, file: AblationFile | None) -> dict[str, Any]:
    """What is tuned, with how many seeds, and the lengths of training."""
    tune = [*(file.tune if file else ()), *arguments.tune]
    return {
        "tune": tuple(parse_tune(one) for one in tune),
        "tuning_seeds": first(arguments.tuning_seeds, file and file.tuning_seeds, 3),
        "horizons": read_horizons(arguments) or tuple(file.horizons if file else ()),
    }


def read_horizons(arguments: argparse.Namespace) -> tuple[float, ...]:
    """The lengths of training that were given, as multiples of the recipe's."""
    try:
        horizons = tuple(float(one) for one in (arguments.horizons or "").split(",") if one)
    except ValueError:
        horizons = (math.nan,)
    if not all(0 < one < math.inf for one in horizons):
        raise UsageError(
            f"--horizons {arguments.horizons}: these are no multiples of train.steps\n"
            "  fix: e.g. --horizons 0.5,1,2"
        )
    return horizons


def planned_looks(arguments: argparse.Namespace, file: AblationFile | None) -> tuple[int, ...]:
    """The numbers of seeds at which verdicts are planned; empty: once, at the number of seeds."""
    looks = tuple(first(arguments.looks, file and file.looks, ()))
    if list(looks) != sorted(set(looks)) or (looks and looks[0] < 2):
        raise UsageError("--looks are numbers of seeds, 2 or more, that increase: --looks 5,10,20")
    if not (arguments.sequential or (file and file.sequential)):
        return looks
    if arguments.seeds is not None:
        raise UsageError(
            "--sequential chooses the number of seeds: give --looks in place of --seeds"
        )
    return looks or SEQUENTIAL_LOOKS


def first(*values: Any) -> Any:
    """The first value that was given."""
    return next(value for value in values if value is not None)


def threads(at_once: int) -> int:
    """Threads of every run, so that all runs together use the processors once."""
    return max(1, (os.cpu_count() or 1) // at_once)


def say(text: str) -> None:
    """A line at once, also where output goes to a file."""
    print(text, flush=True)


def require_libraries() -> None:
    """Raise PluginError if a library that the report needs is not installed."""
    missing = [name for name in ("scipy", "matplotlib") if find_spec(name) is None]
    if missing:
        raise PluginError(
            f"ablate needs {' and '.join(missing)} for its statistics and pictures\n  fix: pip"
            " install 'lswt-core[ablate]'"
        )
