"""``python -m lswt_core coord-check RECIPE``: does the size of activations depend on the width?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lswt_core.cli.common import recipe_arguments, report_source, required_registry
from lswt_core.errors import UsageError
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.recipe import Recipe

if TYPE_CHECKING:
    from lswt_core.model.activation_growth import Measurement


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    recipe_arguments(parser)
    parser.add_argument(
        "--widths",
        default="64,128,256",
        metavar="64,128",
        help="values of model.d_model; heads stay as wide as the recipe's (default: 64,128,256)",
    )
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="updates of each model (default: 4)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a picture")
    parser.add_argument("--json", action="store_true", help="print JSON")


def coord_check(arguments: argparse.Namespace) -> int:
    """Train a recipe for a few steps at several widths, and print how activations grow."""
    registry = required_registry(arguments)
    recipe = Recipe.load(arguments.recipe, arguments.overrides, registry=registry)
    report_source(recipe, arguments.recipe)
    overrides = [width_overrides(recipe, width) for width in read_widths(arguments.widths)]
    if arguments.steps < 1:
        raise UsageError("--steps is at least 1")
    from lswt_core.benchmark import coordinate_check
    from lswt_core.distributed.world import World
    from lswt_core.model.activation_growth import fit_growth

    device = World.read().device
    measured: list[Measurement] = []
    for own in overrides:
        sized = Recipe.load(arguments.recipe, [*arguments.overrides, *own], registry=registry)
        measured += coordinate_check.measure_width(sized, registry, device, arguments.steps)
    growths = fit_growth(measured)
    if arguments.plot is not None:
        save_plot(arguments.plot, measured)
    unstable = [one for one in growths if not one.is_stable]
    if arguments.json:
        sizes, fits = [m._asdict() for m in measured], [g._asdict() for g in growths]
        print(json.dumps({"sizes": sizes, "growth": fits, "stable": not unstable}, indent=2))
    else:
        print(coordinate_check.format_sizes(measured, growths))
        print(verdict(len(unstable)))
    return 0


def save_plot(path: Path, measured: Sequence[Measurement]) -> None:
    """Draw sizes by width into a PNG file. Raises PluginError without matplotlib."""
    from lswt_core.benchmark.coordinate_check import draw_sizes
    from lswt_core.reporting.curves import render_png, require_matplotlib

    require_matplotlib(str(path))
    write_atomically(path, render_png(draw_sizes(measured)))


def verdict(unstable: int) -> str:
    """What the exponents mean."""
    if unstable:
        return f"{unstable} activations grow with the width: a learning rate will not transfer"
    return "no activation grows with the width"


def read_widths(text: str) -> list[int]:
    """The widths of the command line, at least two, in order. Raises UsageError."""
    try:
        widths = sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise UsageError(f"--widths {text}: write whole numbers, e.g. 64,128,256") from error
    if len(widths) < 2 or widths[0] < 1:
        raise UsageError(f"--widths {text}: give at least two different widths")
    return widths


def width_overrides(recipe: Recipe, width: int) -> list[str]:
    """Overrides that make a recipe's model as wide, with heads of the same width. Raises
    UsageError if that gives no whole number of heads.
    """
    model = recipe.model
    d_head = model.d_model // model.n_heads
    if width % d_head:
        raise UsageError(
            f"--widths {width} is no multiple of the recipe's head width, {d_head}"
            f" (model.d_model / model.n_heads): choose e.g. {d_head * max(1, width // d_head)}"
        )
    overrides = [f"model.d_model={width}", f"model.n_heads={width // d_head}"]
    for key, size in (("d_ffn", model.d_ffn), ("n_kv_heads", model.n_kv_heads)):
        if size is not None:
            overrides.append(f"model.{key}={max(1, size * width // model.d_model)}")
    return overrides
