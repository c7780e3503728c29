"""``python -m lswt_core plugins describe KIND/NAME``: what one component is and takes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lswt_core.cli.common import plugin_argument, registry_of
from lswt_core.cli.offers import load_class, offer_json, usable_json
from lswt_core.cli.scaffold import kind_named
from lswt_core.errors import UsageError
from lswt_core.recipe.loader import shown_path
from lswt_core.recipe.toml_writer import value
from lswt_core.registry import REQUIRED, Offer
from lswt_core.registry.capabilities import capabilities
from lswt_core.registry.kinds import KINDS
from lswt_core.registry.option_schema import words


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("component", metavar="KIND/NAME", help="e.g. positional/rope")
    plugin_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def describe(arguments: argparse.Namespace) -> int:
    """Print a component's documentation, options, capabilities, source and citation."""
    text, slash, name = arguments.component.partition("/")
    if not slash:
        raise UsageError(
            f"{text!r} names no component: write KIND/NAME, e.g. positional/rope (see: python -m"
            " lswt_core plugins list)"
        )
    kind = kind_named(text)
    registry = registry_of(arguments)
    with redirect_stdout(sys.stderr):  # what plugins print is not this command's output
        offer = registry.find(kind.name, name)
        component, cause = load_class(registry, offer)
    able = None if component is None else capabilities(kind, component)
    if arguments.json:
        facts = offer_json(offer) | usable_json(cause)
        print(json.dumps(facts | {"many": kind.many, "capabilities": able}, indent=2))
    else:
        print("\n".join(description_lines(offer, cause, able)))
    return 0


def description_lines(offer: Offer, cause: str | None, able: Mapping[str, Any] | None) -> list[str]:
    """A component for people, line by line."""
    lines = [
        f"{offer.kind}/{offer.name}",
        f"  distribution: {offer.distribution} {offer.version}",
        f"  source: {shown_path(Path(offer.source))}",
        f"  imports: {f'no: {cause}' if cause else 'yes'}",
        f"  in a recipe: {recipe_use(offer)}",
        "",
        offer.doc,
        "",
        "options" if offer.options else "no options",
    ]
    for option in offer.options:
        default = "required" if option.default is REQUIRED else f"default {toml(option.default)}"
        lines.append(f"  {option.name}: {words(option.annotation)} ({default})")
    if able:
        lines += ["", "capabilities"]
        lines += [f"  {name}: {capability_text(fact)}" for name, fact in able.items()]
    if offer.citation:
        lines += ["", offer.citation]
    return lines


def recipe_use(offer: Offer) -> str:
    """How a recipe chooses a component."""
    kind = KINDS[offer.kind]
    if kind.many:
        return f"[{kind.table}.{offer.name}], beside others"
    return f'[{kind.table}] use = "{offer.name}"'


def capability_text(fact: Mapping[str, Any]) -> str:
    """A capability in words."""
    if isinstance(fact["value"], list):
        return ", ".join(fact["value"]) or "none"
    if fact["of"] == "class":
        return toml(fact["value"])
    return f"depends on the options; by default {toml(fact['value'])}"


def toml(given: Any) -> str:
    """A value as a recipe has it."""
    return "none" if given is None else value(given)
