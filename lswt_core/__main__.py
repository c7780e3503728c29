"""``python -m lswt_core`` (or ``lswt``): all commands. Each imports what it needs when it is called."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from lswt_core import __version__, share
from lswt_core import ablate as ablate_command
from lswt_core import generate as generate_command
from lswt_core import plan as plan_command
from lswt_core import run as run_command
from lswt_core.cli import guarded, plugin_argument, recipe_arguments, registry_of
from lswt_core.kinds import KINDS
from lswt_core.recipe import Recipe
from lswt_core.registry import REQUIRED, Offer
from lswt_core.registry.schema import words


def explain(arguments: argparse.Namespace) -> int:
    """Where a value comes from, oldest first."""
    recipe = Recipe.load(arguments.recipe, arguments.overrides, overlay=arguments.overlay, registry=registry_of(arguments))
    for value, origin in recipe.explain(arguments.key):
        print(f"{arguments.key} = {value!r}  <- {origin.where}" + (f"   {origin.text}" if origin.text else ""))
    return 0


def resolve(arguments: argparse.Namespace) -> int:
    """The recipe with every default written out."""
    recipe = Recipe.load(arguments.recipe, arguments.overrides, overlay=arguments.overlay, registry=registry_of(arguments))
    print(recipe.dump(), end="")
    return 0


def list_plugins(arguments: argparse.Namespace) -> int:
    """Every component on offer, and plugins that are broken."""
    registry = registry_of(arguments)
    offers, broken = registry.offers(), registry.broken()
    if arguments.json:
        print(
            json.dumps({"components": [offer_json(offer) for offer in offers], "broken": [entry._asdict() for entry in broken]}, indent=2)
        )
        return 0
    for kind in KINDS:
        for offer in (offer for offer in offers if offer.kind == kind):
            print(f"{kind:<12}{offer.name:<18}{f'{offer.distribution} {offer.version}':<24}{first_line(offer.doc)}")
    for entry in broken:
        print(f"{'broken':<12}{entry.entry:<18}{f'{entry.distribution} {entry.version}':<24}{entry.cause}")
    return 0


def describe_plugin(arguments: argparse.Namespace) -> int:
    """One component: what it is, its options, its source."""
    kind, _, name = arguments.component.partition("/")
    offer = registry_of(arguments).find(kind, name)
    if arguments.json:
        print(json.dumps(offer_json(offer), indent=2))
        return 0
    print(f"{offer.kind}/{offer.name}  ({offer.distribution} {offer.version}, {offer.source})\n\n{offer.doc}\n")
    for option in offer.options:
        default = "required" if option.default is REQUIRED else f"default {option.default!r}"
        print(f"  {option.name}: {words(option.annotation)} ({default})")
    if offer.citation:
        print(f"\n{offer.citation}")
    return 0


def offer_json(offer: Offer) -> dict[str, Any]:
    """An offer as plain data."""
    options = {
        o.name: {
            "type": annotation_text(o.annotation),
            "means": words(o.annotation),
            "default": None if o.default is REQUIRED else o.default,
        }
        for o in offer.options
    }
    return offer._asdict() | {"options": options}


def annotation_text(annotation: Any) -> str:
    """A type as one would write it."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def first_line(text: str) -> str:
    """The first line of a docstring."""
    return text.strip().splitlines()[0] if text.strip() else ""


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = argparse.ArgumentParser(prog="lswt", description="Pretrain and ablate language models of the LSWTransformer family.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, function: Any, summary: str, to: Any = commands) -> argparse.ArgumentParser:
        one = to.add_parser(name, help=summary, description=summary)
        one.set_defaults(function=function)
        return one

    run_command.arguments_of(add("run", run_command.run, "train what a recipe describes, or go on where it stopped"))
    generate_command.arguments_of(add("generate", generate_command.generate, "let a trained model go on with a text"))
    share.export_arguments(add("export", share.export, "write a run as a HuggingFace model, and push it"))
    share.import_arguments(add("import", share.import_original, "turn a checkpoint of the original authors' code into our format"))
    ablate_command.arguments_of(add("ablate", ablate_command.ablate, "compare a recipe with swaps of its components, honestly"))
    plan_command.arguments_of(add("plan", plan_command.plan, "what a recipe takes: parameters, memory, work and time; allocates nothing"))
    for name, function, summary in (
        ("explain", explain, "where a value of a recipe comes from"),
        ("resolve", resolve, "print a recipe with every default written out"),
    ):
        one = add(name, function, summary)
        if name == "explain":
            one.add_argument("key", help="e.g. train.rows")
        recipe_arguments(one)
        one.add_argument("--overlay", help="apply this overlay of the recipe, e.g. cpu")
        one.add_argument("--json", action="store_true", help="print JSON")
    plugins = commands.add_parser("plugins", help="what is installed").add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, function, summary in (
        ("list", list_plugins, "every component on offer"),
        ("describe", describe_plugin, "options, documentation and citation of one component"),
    ):
        one = add(name, function, summary, plugins)
        if name == "describe":
            one.add_argument("component", metavar="KIND/NAME", help="e.g. positional/rope")
        plugin_argument(one)
        one.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if hasattr(arguments, "overrides"):
        arguments.overrides += overrides
        rest = [word for word in rest if word not in overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not hasattr(arguments, "function"):
        parser.print_help()
        return 0
    return guarded(arguments.function, arguments)


if __name__ == "__main__":
    sys.exit(main())
