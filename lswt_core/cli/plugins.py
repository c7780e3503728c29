"""``python -m lswt_core plugins``: the commands about plugins."""

from lswt_core.cli import plugins_check, plugins_describe, plugins_list, plugins_new
from lswt_core.cli.common import Entry

COMMANDS = (
    Entry(
        "list",
        plugins_list.arguments_of,
        plugins_list.list_plugins,
        "every component on offer, and whether it can be imported",
    ),
    Entry(
        "describe",
        plugins_describe.arguments_of,
        plugins_describe.describe,
        "options, capabilities, documentation and citation of one component",
    ),
    Entry(
        "check",
        plugins_check.arguments_of,
        plugins_check.check,
        "does a plugin keep what its interfaces promise?",
    ),
    Entry(
        "new",
        plugins_new.arguments_of,
        plugins_new.new,
        "write a package around a new component, which works as it stands",
    ),
)
