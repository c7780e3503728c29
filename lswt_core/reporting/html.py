"""What report pages share: their style, and small pieces of HTML. A page is one file that needs
nothing else.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --soft: #f5f5f3; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #3c3c3c; --soft: #232323; --quiet: #a0a0a0; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 58rem; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.15rem; }
.verdict { font-size: 1.1rem; margin-top: .4rem; } .quiet { color: var(--quiet); }
img { width: 100%; border: 1px solid var(--line); border-radius: 6px; background: white; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; } th:first-child, td:first-child, .plain td, .plain th { text-align: left; }
.wide { overflow-x: auto; } .plain table td, .plain table th { border: 0; } .plain td { overflow-wrap: anywhere; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; overflow-x: auto;
  font-size: .85rem; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; } summary { cursor: pointer; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page; the title is escaped already."""
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{title}</title><style>{STYLE}</style>'
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def section(title: str, body: str, *, folded: bool = False) -> str:
    """A headed part of a page; nothing where there is no body."""
    if not body:
        return ""
    if folded:
        return f"<h2>{title}</h2><details><summary>show</summary>{body}</details>"
    return f"<h2>{title}</h2>{body}"


def image(png: bytes, alt: str) -> str:
    """A picture within the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """Rows of text under a header."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        "<div"
        f' class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def nested(value: Any) -> str:
    """Any JSON value as tables within tables."""
    if isinstance(value, Mapping):
        rows = "".join(
            f"<tr><th>{escape(str(key))}</th><td>{nested(member)}</td></tr>"
            for key, member in value.items()
        )
        return f"<table>{rows}</table>"
    if isinstance(value, list):
        return "<br>".join(nested(member) for member in value)
    return escape("" if value is None else str(value))
