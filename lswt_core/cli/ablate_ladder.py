"""``ablate ... --ladder FILE``: the arms at every rung of a ladder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lswt_core.ablation.arms import read_ablation_file
from lswt_core.ablation.ladder_file import Ladder, read_ladder
from lswt_core.cli.ablate_command_line import after_dry_run
from lswt_core.cli.third_party_checks import check_plugins
from lswt_core.errors import UsageError
from lswt_core.plugin_api.atomic_write import make_output_directory

if TYPE_CHECKING:
    from lswt_core.ablation.ladder import LadderAblation
    from lswt_core.ablation.run_ladder import LadderStudy
    from lswt_core.ablation.runs.runner import Workers
    from lswt_core.ablation.study import Ablation


def find_ladder(arguments: argparse.Namespace) -> Ladder | None:
    """The ladder of the command line, or of its ablation file; None if there is none. The baseline
    is the ladder's where the command names none.
    """
    ladder = None if arguments.ladder is None else read_ladder(arguments.ladder)
    if arguments.recipe is not None and "=" in arguments.recipe.name:
        arguments.overrides.insert(0, str(arguments.recipe))
        arguments.recipe = None
    if arguments.recipe is None:
        if ladder is None or ladder.recipe is None:
            raise UsageError("the baseline's recipe is missing\n  fix: name one, e.g. quickstart")
        arguments.recipe = Path(ladder.recipe)
    read = read_ablation_file(arguments.recipe)
    if ladder is None and read is not None and read[0].ladder is not None:
        ladder = read_ladder(read[0].ladder, read[1].path.parent)
    return ladder


def ablate_ladder(
    arguments: argparse.Namespace,
    planned: Ablation,
    ladder: Ladder,
    workers: Workers,
    say: Callable[[str], None],
) -> tuple[LadderStudy, Path] | None:
    """Certify the arms at every rung, make the runs, write the report; return both, None of a dry
    run. ``planned`` is the ablation without the ladder, nothing of which is built.
    """
    if planned.spec.sequential:
        raise UsageError(
            "--sequential: where it stops depends on one size, and a ladder has several\n"
            "  fix: leave one of them out, or give --seeds in place of --sequential"
        )
    from lswt_core.ablation.ladder import LadderAblation
    from lswt_core.ablation.report.publish import claim

    ablation = LadderAblation(planned.spec, ladder, planned.registry, planned.world, say)
    ablation.build()
    check_plugins(arguments, [arm.recipe for arm in ablation.arms], ablation.registry, say)
    say(ablation.describe_arms())
    if arguments.dry_run:
        say(after_dry_run(arguments))
        return None
    name = f"{ablation.spec.name}-{ladder.name}-{ablation.fingerprint()}"
    directory = arguments.out or Path("runs/ablations") / name
    claim(directory, ablation.fingerprint())
    make_output_directory(arguments.store, "--store")
    return run(ablation, arguments.store, workers, directory), directory


def run(ablation: LadderAblation, store: Path, workers: Workers, directory: Path) -> LadderStudy:
    """Make the runs and write the report, also of a study that is stopped."""
    from lswt_core.ablation.report.publish import publish_ladder
    from lswt_core.ablation.run_ladder import LadderStopped, run_ladder
    from lswt_core.ablation.runs.store import RunStore

    try:
        study = run_ladder(ablation, RunStore(store), workers)
    except LadderStopped as stopped:
        publish_ladder(stopped.ladder, directory)
        where = directory / "report.html"
        ablation.say(f"report of what is finished, without verdicts: {where}")
        raise
    print(publish_ladder(study, directory))
    return study
