"""``python -m lswt_core plugins new NAME --kind KIND``: write a package around a new component."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from lswt_core.cli import scaffold
from lswt_core.cli.common import plugin_argument, registry_of
from lswt_core.registry.kinds import KINDS


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
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
    """Write a package, and print the commands that come next."""
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
