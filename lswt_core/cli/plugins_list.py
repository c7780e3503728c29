"""``python -m lswt_core plugins list``: every component and recipe that plugins offer."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from textwrap import shorten

from lswt_core.cli.common import plugin_argument, registry_of
from lswt_core.cli.offers import load_class, offer_json, usable_json
from lswt_core.cli.recipes import description, recipe_json
from lswt_core.recipe.loader import shown_path
from lswt_core.recipe.packaged import plugin_recipes
from lswt_core.recipe.provenance import USE
from lswt_core.registry import AUTO, Broken, Offer
from lswt_core.registry.kinds import KINDS, Kind
from lswt_core.reporting.tables import Table

COLUMNS = ("kind", "name", "distribution", "imports", "source", "what it is")
SUMMARY = 80  # characters of "what it is"
# " (Su et al. 2021, arXiv 2104.09864)"
CITATION = re.compile(r" \([A-Z][^()]*\b(19|20)\d\d\b[^()]*\)")
Usable = tuple[Offer, str | None]  # an offer, and why it cannot be used


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    plugin_argument(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--markdown", action="store_true", help="print a table of kinds and their components"
    )


def list_plugins(arguments: argparse.Namespace) -> int:
    """Print every component on offer, plugins that are broken, and recipes of plugin packages."""
    registry = registry_of(arguments)
    # what plugins print when they are imported is not this command's output
    with redirect_stdout(sys.stderr):
        offers, broken = registry.offers(), registry.broken()
        usable = [(offer, load_class(registry, offer)[1]) for offer in offers]
    if arguments.markdown:
        print(kinds_table(offers).markdown())
        return 0
    if arguments.json:
        print(json.dumps(as_json(usable, broken), indent=2))
    else:
        rows = list(table_rows(usable, broken))
        print(Table(COLUMNS, rows, text_columns=range(len(COLUMNS))).text())
    return 0


def as_json(usable: Sequence[Usable], broken: Sequence[Broken]) -> dict[str, list[object]]:
    """The list as plain data."""
    return {
        "components": [offer_json(offer) | usable_json(cause) for offer, cause in usable],
        "broken": [entry._asdict() for entry in broken],
        "recipes": [recipe_json(recipe) for recipe in plugin_recipes()],
    }


def table_rows(usable: Sequence[Usable], broken: Sequence[Broken]) -> Iterator[tuple[str, ...]]:
    """The list as rows of a table."""
    for offer, cause in usable:
        origin, about = f"{offer.distribution} {offer.version}", cause or summary(offer.doc)
        source = shown_path(Path(offer.source))
        yield offer.kind, offer.name, origin, "no" if cause else "yes", source, about
    for entry in broken:
        yield "broken", entry.entry, f"{entry.distribution} {entry.version}", "no", "", entry.cause
    for recipe in plugin_recipes():
        origin, source = f"{recipe.package} {recipe.version}", shown_path(recipe.path)
        yield "recipe", recipe.qualified, origin, "", source, description(recipe.path)


def summary(text: str) -> str:
    """The beginning of a docstring in one line of up to SUMMARY characters, without citations."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return shorten(CITATION.sub("", paragraph), SUMMARY, placeholder=" ...")


def kinds_table(offers: Sequence[Offer]) -> Table:
    """The kinds, their recipe tables and components, defaults in Markdown's bold."""
    rows = []
    for kind in KINDS.values():
        names = sorted({offer.name for offer in (*offers, AUTO) if offer.kind == kind.name})
        marked = [f"**{name}**" if name == USE.get(kind.name) else name for name in names]
        rows.append((kind.name, recipe_table(kind), ", ".join(marked)))
    return Table(("kind", "recipe table", "components (**default**)"), rows, text_columns=range(3))


def recipe_table(kind: Kind) -> str:
    """The header of a kind's table in a recipe."""
    return f"[{kind.table}.NAME]" if kind.many else f"[{kind.table}]"
