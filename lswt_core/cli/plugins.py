"""``python -m lswt_core plugins``: what is installed, what one component is, and a new package
around a component of one's own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lswt_core.cli import plugins_check as check_command
from lswt_core.cli import scaffold
from lswt_core.cli.common import Entry, plugin_argument, registry_of
from lswt_core.errors import PluginError, UsageError
from lswt_core.recipe.toml_writer import value
from lswt_core.registry import REQUIRED, Offer, Registry
from lswt_core.registry.capabilities import capabilities
from lswt_core.registry.kinds import KINDS
from lswt_core.registry.option_schema import bounds, plain, words
from lswt_core.reporting.tables import Table

# ---------- list


def list_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``list``."""
    plugin_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def list_plugins(arguments: argparse.Namespace) -> int:
    """Every component on offer, and plugins that are broken."""
    registry = registry_of(arguments)
    # what plugins print when they are imported is not this command's output
    with redirect_stdout(sys.stderr):
        offers, broken = registry.offers(), registry.broken()
        causes = [imported(registry, offer)[1] for offer in offers]
    if arguments.json:
        components = [
            offer_json(offer) | imports_json(cause)
            for offer, cause in zip(offers, causes, strict=True)
        ]
        print(
            json.dumps(
                {"components": components, "broken": [entry._asdict() for entry in broken]},
                indent=2,
            )
        )
        return 0
    rows = [("kind", "name", "distribution", "imports", "source", "what it is")]
    for offer, cause in zip(offers, causes, strict=True):
        about = first_line(offer.doc) if cause is None else cause
        origin = f"{offer.distribution} {offer.version}"
        rows.append(
            (offer.kind, offer.name, origin, "no" if cause else "yes", nearby(offer.source), about)
        )
    rows += [
        ("broken", entry.entry, f"{entry.distribution} {entry.version}", "no", "", entry.cause)
        for entry in broken
    ]
    print(Table(rows[0], rows[1:], text_columns=range(len(rows[0]))).text())
    return 0


def imported(registry: Registry, offer: Offer) -> tuple[type | None, str | None]:
    """The class behind an offer, or why it cannot be had."""
    try:
        return registry.load(offer), None
    except PluginError as error:
        return None, str(error)


def imports_json(cause: str | None) -> dict[str, Any]:
    """Whether a component can be imported, as plain data."""
    return {"imports": cause is None, "cause": cause}


def nearby(path: str) -> str:
    """A path, short where it is below the working directory."""
    return (
        str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path
    )


def first_line(text: str) -> str:
    """The first line of a docstring."""
    return text.strip().splitlines()[0] if text.strip() else ""


# ---------- describe


def describe_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``describe``."""
    parser.add_argument("component", metavar="KIND/NAME", help="e.g. positional/rope")
    plugin_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def describe(arguments: argparse.Namespace) -> int:
    """One component: what it is, its options, what it says it can do, its source."""
    text, slash, name = arguments.component.partition("/")
    if not slash:
        raise UsageError(
            f"{text!r} names no component: write KIND/NAME, e.g. positional/rope (see: python -m"
            " lswt_core plugins list)"
        )
    kind = scaffold.kind_named(text)
    registry = registry_of(arguments)
    with redirect_stdout(sys.stderr):  # as in a list
        offer = registry.find(kind.name, name)
        component, cause = imported(registry, offer)
    able = None if component is None else capabilities(kind, component)
    if arguments.json:
        print(
            json.dumps(
                offer_json(offer) | imports_json(cause) | {"many": kind.many, "capabilities": able},
                indent=2,
            )
        )
        return 0
    print("\n".join(described(offer, cause, able)))
    return 0


def described(offer: Offer, cause: str | None, able: Mapping[str, Any] | None) -> list[str]:
    """A component for people, line by line."""
    kind = KINDS[offer.kind]
    lines = [
        f"{offer.kind}/{offer.name}",
        f"  distribution: {offer.distribution} {offer.version}",
        f"  source: {nearby(offer.source)}",
    ]
    lines += [f"  imports: {f'no: {cause}' if cause else 'yes'}"]
    lines += [
        f"  in a recipe: [{kind.table}.{offer.name}], beside others"
        if kind.many
        else f'  in a recipe: [{kind.table}] use = "{offer.name}"'
    ]
    lines += ["", offer.doc, "", "options" if offer.options else "no options"]
    for option in offer.options:
        default = "required" if option.default is REQUIRED else f"default {shown(option.default)}"
        lines.append(f"  {option.name}: {words(option.annotation)} ({default})")
    lines += (
        ["", "capabilities", *(f"  {name}: {capability(found)}" for name, found in able.items())]
        if able
        else []
    )
    return [*lines, *(["", offer.citation] if offer.citation else [])]


def capability(found: Mapping[str, Any]) -> str:
    """A capability in words."""
    if isinstance(found["value"], list):
        return ", ".join(found["value"]) or "none"
    if found["of"] == "class":
        return shown(found["value"])
    return f"set when it is built, from its options; else {shown(found['value'])}"


def shown(given: Any) -> str:
    """A value as a recipe has it."""
    return "none" if given is None else value(given)


def offer_json(offer: Offer) -> dict[str, Any]:
    """An offer as plain data."""
    options = {
        option.name: {
            "type": annotation_text(plain(option.annotation)),
            "bounds": bounds(option.annotation),
            "means": words(option.annotation),
            "default": None if option.default is REQUIRED else option.default,
            "required": option.default is REQUIRED,
        }
        for option in offer.options
    }
    return offer._asdict() | {"options": options}


def annotation_text(annotation: Any) -> str:
    """A type as one would write it."""
    return (
        annotation.__name__
        if isinstance(annotation, type)
        else str(annotation).replace("typing.", "")
    )


# ---------- new


def new_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``new``."""
    parser.add_argument(
        "name", metavar="NAME", help="what recipes will call the component, e.g. my-variant"
    )
    parser.add_argument("--kind", required=True, help=f"what it is: {', '.join(KINDS)}")
    parser.add_argument(
        "--in",
        dest="parent",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where to put the package (default: here)",
    )
    plugin_argument(parser)


def new(arguments: argparse.Namespace) -> int:
    """Write a package, and say what to do with it."""
    kind = scaffold.kind_named(arguments.kind)
    folder = scaffold.create(kind, arguments.name, arguments.parent, registry_of(arguments))
    module = scaffold.module_of(arguments.name)
    place = shlex.quote(str(folder))
    print(
        f"wrote {folder}: change {module}.py and pyproject.toml; README.md and test_{module}.py go"
        " with them\n\nnext:"
    )
    print(f"  python -m pip install -e {place}")
    print(f"  python -m lswt_core plugins check {module}")
    for command in scaffold.commands(kind, arguments.name):
        print(f"  {command}")
    print(
        f"\nor, without an installation:\n  {scaffold.commands(kind, arguments.name)[0]} --plugin"
        f" {place}/{module}.py"
    )
    return 0


COMMANDS = (
    Entry(
        "list",
        list_arguments,
        list_plugins,
        "every component on offer, and whether it can be imported",
    ),
    Entry(
        "describe",
        describe_arguments,
        describe,
        "options, capabilities, documentation and citation of one component",
    ),
    Entry(
        "check",
        check_command.arguments_of,
        check_command.check,
        "does a plugin keep what its interfaces promise?",
    ),
    Entry(
        "new",
        new_arguments,
        new,
        "write a package around a new component, which works as it stands",
    ),
)
