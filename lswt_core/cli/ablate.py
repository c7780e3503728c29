"""``python -m lswt_core ablate RECIPE --swap ffn=gelu --seeds 5``: is a component worth it? Arms
that differ from a baseline in one thing, several seeds each, and an honest report.
"""

from __future__ import annotations

import argparse
import os
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
from lswt_core.cli.ablate_command_line import after_dry_run, words_of
from lswt_core.cli.common import report_source, required_registry
from lswt_core.cli.third_party_checks import check_plugins
from lswt_core.errors import PluginError, RunsFailed, UsageError
from lswt_core.plugin_api.atomic_write import make_output_directory
from lswt_core.recipe import Recipe
from lswt_core.recipe.loader import find

if TYPE_CHECKING:
    from lswt_core.ablation.runs.outcome import Study
    from lswt_core.ablation.runs.runner import Workers
    from lswt_core.ablation.study import Ablation

SEQUENTIAL_LOOKS = (5, 10, 20)  # default


def ablate(arguments: argparse.Namespace) -> int:
    """Certify the arms, make the runs, write the report."""
    ablation, baseline = planned_ablation(arguments)
    spec = ablation.spec
    ablation.build(baseline)
    check_plugins(arguments, [arm.recipe for arm in ablation.arms], ablation.registry, say)
    say(ablation.describe_arms())
    if arguments.dry_run:
        say(after_dry_run(arguments))
        return 0
    from lswt_core.ablation.report.publish import claim, publish
    from lswt_core.ablation.runs.store import RunStore
    from lswt_core.ablation.sequential import run_sequentially
    from lswt_core.ablation.study import Ablation, require_certified

    directory = arguments.out or Path("runs/ablations") / f"{spec.name}-{spec.fingerprint()}"
    claim(directory, spec.fingerprint())
    make_output_directory(arguments.store, "--store")
    run = run_sequentially if spec.sequential else Ablation.run
    study = run(ablation, RunStore(arguments.store), workers_of(arguments))
    print(publish(study, directory))
    require_certified(study)
    refuse_failed(study, directory)
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
    )
    return Ablation(spec, registry, world, say), recipe.with_overlay(overlay)


def workers_of(arguments: argparse.Namespace) -> Workers:
    """How many runs are made at once, and on which devices."""
    from lswt_core.ablation.runs.runner import Workers

    devices = arguments.devices.split(",") if arguments.devices else []
    at_once = arguments.jobs or len(devices) or 1
    return Workers(at_once, threads(at_once), devices, arguments.plugin, arguments.unchecked)


def refuse_failed(study: Study, directory: Path) -> None:
    """Raise RunsFailed if runs failed; the report is written, and says which."""
    outcomes = [one for arm in study.arms for one in arm.outcomes]
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
    }
    if settings["seeds"] < 1 or settings["margin"] <= 0:
        raise UsageError("--seeds is at least 1, and --margin greater than 0")
    return find(arguments.recipe).stem, require_arms(arms), settings


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
