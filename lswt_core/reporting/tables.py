"""Tables of text as plain text, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

LINE_WIDTH = 100  # characters of a line of text on a terminal


class Table(NamedTuple):
    """A header and rows of equally many cells.

    Columns of text are left-aligned, the others hold numbers and are right-aligned; a number never
    wraps in HTML.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Sequence[int] = (0,)

    def text(self, indent: str = "") -> str:
        """Return the table in columns of equal width, two spaces apart."""
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(self._text_line(cells, widths, indent) for cells in lines)

    def _text_line(self, cells: Sequence[str], widths: Sequence[int], indent: str) -> str:
        padded = []
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            alignment = "<" if column in self.text_columns else ">"
            padded.append(f"{cell:{alignment}{width}}")
        return (indent + "  ".join(padded)).rstrip()

    def markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        rules = []
        for column in range(len(self.header)):
            rules.append("---" if column in self.text_columns else "---:")
        lines = [list(map(_markdown_cell, cells)) for cells in (self.header, *self.rows)]
        lines.insert(1, rules)
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

    def html(self, *, stacked: bool = False) -> str:
        """Return the table in HTML, in a box that scrolls sideways where it is too wide; if it is
        ``stacked``, a narrow window shows every row as a list instead.
        """
        head = self._html_line("th", self.header)
        body = "".join(self._html_line("td", cells, stacked) for cells in self.rows)
        kind = "wide stacked" if stacked else "wide"
        table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
        return f'<div class="{kind}">{table}</div>'

    def _html_line(self, tag: str, cells: Sequence[str], labelled: bool = False) -> str:
        parts = []
        for column, cell in enumerate(cells):
            kind = ' class="text"' if column in self.text_columns else ""
            label = f' data-label="{escape(self.header[column])}"' if labelled else ""
            parts.append(f"<{tag}{kind}{label}>{escape(cell)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"


def _markdown_cell(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
