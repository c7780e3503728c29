"""acceptance.json and the pages made of it: written anew after every item, so that a run that is
killed keeps what it had. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from lswt_core.acceptance.item import Item, Result
from lswt_core.errors import UsageError
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.reporting.html import nested_tables, page, section
from lswt_core.reporting.tables import LINE_WIDTH, Table

JSON, MARKDOWN, HTML = "acceptance.json", "acceptance.md", "acceptance.html"
TITLE = "Acceptance"
DIGITS = 4  # of a number on a page


class Record:
    """The results of a directory."""

    def __init__(self, directory: Path, header: Mapping[str, Any]) -> None:
        """``header``: what applies to all items: command, time, machine."""
        self.directory, self.header = directory, header
        self.items: dict[str, dict[str, Any]] = {}  # by name, in the order they were run
        self.left: list[str] = []  # names of items that are to be run

    def keep_earlier(self) -> None:
        """Take the results that the directory has, for those that are not run again. Raises
        UsageError if they cannot be read.
        """
        path = self.directory / JSON
        if not path.is_file():
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))["items"]
            self.items = {item["name"]: item for item in earlier}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error}): remove it") from error

    def add(self, item: Item, result: Result) -> None:
        """Add a result, and write all files."""
        self.items.pop(item.name, None)
        self.items[item.name] = {
            "name": item.name,
            "asserts": item.asserts,
            "status": result.status,
            "reason": result.reason,
            "seconds": round(result.seconds, 2),
            "estimate_seconds": item.seconds,
            "limit_seconds": item.limit,
            "numbers": result.numbers,
            "target": item.target,
            "arguments": item.arguments,
        }
        if item.name in self.left:
            self.left.remove(item.name)
        self.write()

    def write(self) -> None:
        """Write JSON and pages."""
        content = {**self.header, "left": self.left, "items": list(self.items.values())}
        text = json.dumps(content, indent=1, default=str)
        write_atomically(self.directory / JSON, text.encode())
        write_atomically(self.directory / MARKDOWN, self.markdown().encode())
        write_atomically(self.directory / HTML, self.html().encode())

    # ---------- pages

    def table(self) -> Table:
        """Every item with its status and what is to be known first."""
        rows = [
            (item["name"], item["status"], f"{item['seconds']:.0f} s", headline(item))
            for item in self.items.values()
        ]
        return Table(("item", "status", "time", "result"), rows, text_columns=(0, 1, 3))

    def console(self) -> str:
        """The table with its last column cut to a terminal's width."""
        table = self.table()
        used = max((len("  ".join(row[:3])) for row in table.rows), default=0)
        room = max(LINE_WIDTH - used, LINE_WIDTH // 3)
        rows = [(*row[:3], shortened(row[3], room)) for row in table.rows]
        return Table(table.header, rows, table.text_columns).text()

    def summary(self) -> str:
        """How many items passed, failed and were skipped."""
        found = [item["status"] for item in self.items.values()]
        counts = [f"{found.count(status)} {status}" for status in ("passed", "failed", "skipped")]
        left = f", {len(self.left)} not run yet" if self.left else ""
        return ", ".join(counts) + left

    def markdown(self) -> str:
        """The page in Markdown."""
        machine = self.header["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
        about = f"{machine.get('name', 'unknown')} ({machine.get('type', '?')}), {versions}"
        lines = [f"# {TITLE}", about, f"`{self.header['command']}`", self.summary()]
        return "\n\n".join([*lines, self.table().markdown(), *self.details()]) + "\n"

    def details(self) -> Iterator[str]:
        """What each item asserts, and why it failed or was left out."""
        for item in self.items.values():
            reason = f" **{item['status']}**: {item['reason']}" if item["reason"] else ""
            yield f"* {item['name']}: {item['asserts']}.{reason}"

    def html(self) -> str:
        """The page in HTML, with all numbers."""
        numbers = {name: item["numbers"] for name, item in self.items.items()}
        asserted = {name: item["asserts"] for name, item in self.items.items()}
        head = f"<h1>{TITLE}</h1><p>{escape(self.summary())}</p>{self.table().html()}"
        sections = [
            head,
            section("Machine and command", nested_tables(self.header)),
            section("What each asserts", nested_tables(asserted)),
            section("Numbers", nested_tables(numbers), folded=True),
        ]
        return page(TITLE, sections)


def headline(item: Mapping[str, Any]) -> str:
    """The reason of a result, or its numbers that stand for themselves."""
    if item["reason"]:
        return str(item["reason"])
    numbers = dict(item["numbers"])
    shown = {}
    if numbers.get("ratio") is not None:
        aim = f" (aim {numbers['aim']:g})" if numbers["aim"] else ""
        shown["ratio"] = f"{numbers.pop('ratio'):.2f}{aim}"
    numbers.pop("aim", None)
    if numbers.get("data_sheet"):
        shown["MFU"] = f"{numbers['data_sheet']['necessary']:.0%}"
    for name, value in numbers.items():
        if isinstance(value, int | float | str):
            shown[name] = f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)
    if "contenders" in numbers:
        shown |= {
            name: f"{row['training']:,.0f} tokens/s" for name, row in numbers["contenders"].items()
        }
    if "cases" in numbers:
        shown |= {"cases": str(len(numbers["cases"])), "refused": str(len(numbers["refused"]))}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def shortened(text: str, room: int) -> str:
    """A text of at most ``room`` characters."""
    return text if len(text) <= room else text[: room - 3] + "..."
