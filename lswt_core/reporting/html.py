"""HTML shared by report pages: style sheet, sections and pictures.

A page is one file that loads nothing else.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

# Tables and pictures that are wider than the window scroll in a box of their own, so that the
# page itself never does; cells of numbers do not wrap, and names in the first column stay in view.
STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --soft: #f5f5f3; --quiet: #5f5f5f; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3c3c3c; --soft: #232323; --quiet: #a8a8a8; }
}
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 70rem; margin: 2.5rem auto;
  padding: 0 1.2rem; overflow-wrap: break-word; }
@media (max-width: 40rem) { body { margin: 1rem auto; padding: 0 .8rem; } }
h1 { margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.4rem; font-size: 1.15rem; }
p, ul { max-width: 58rem; }
.verdict { font-size: 1.1rem; margin-top: .4rem; }
.quiet { color: var(--quiet); }
.wide { overflow-x: auto; }
.picture { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px;
  background: white; }
img { display: block; width: 100%; min-width: 38rem; }
.narrow { max-width: 44rem; }
.narrow img { min-width: 0; }
.picture, .wide { margin: .5rem 0 .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
.text { text-align: left; white-space: normal; min-width: 7.5rem; overflow-wrap: anywhere; }
.text:first-child { min-width: 10rem; }
.wide > table .text:first-child { position: sticky; left: 0; background: Canvas; }
.plain th, .plain td { border: 0; text-align: left; vertical-align: top; }
.plain td { white-space: normal; overflow-wrap: anywhere; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; }
summary h2 { display: inline; margin: 0; font-size: 1rem; }
details { margin: 0; padding: .55rem 0; border-top: 1px solid var(--line); }
@media (max-width: 40rem) {
  .stacked thead { display: none; }
  .stacked table, .stacked tbody, .stacked tr, .stacked td { display: block; border: 0; }
  .stacked tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  .stacked td { text-align: left; padding: 0; white-space: normal; min-width: 0; }
  .stacked td:empty { display: none; }
  .stacked td:first-child { font-weight: 600; }
  .stacked td:not(:first-child)::before { content: attr(data-label) ": "; color: var(--quiet); }
}
"""


def page(title: str, sections: Iterable[str]) -> str:
    """Return a whole page; ``title`` is escaped already, empty sections are left out."""
    head = (
        '<meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style>"
    )
    body = "\n".join(filter(None, sections))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def section(title: str, body: str, *, folded: bool = False) -> str:
    """Return a section with a heading; empty where ``body`` is."""
    if not body:
        return ""
    if folded:
        return f"<details><summary><h2>{title}</h2></summary>{body}</details>"
    return f"<h2>{title}</h2>{body}"


def image(png: bytes, alt: str, *, narrow: bool = False) -> str:
    """Return a picture embedded in the page; ``alt`` says in words what it shows. One that is
    ``narrow`` is legible in a narrow window.
    """
    source = base64.b64encode(png).decode()
    kind = "picture narrow" if narrow else "picture"
    return (
        f'<div class="{kind}"><img alt="{escape(alt)}" src="data:image/png;base64,{source}"></div>'
    )


def bullet_list(lines: Sequence[str]) -> str:
    """Return a list; empty where there are no lines."""
    if not lines:
        return ""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def code(text: str) -> str:
    """Return preformatted text."""
    return f"<pre>{escape(text)}</pre>"


def nested_tables(value: Any) -> str:
    """Return any JSON value as tables within tables."""
    return f'<div class="plain wide">{_nested(value)}</div>'


def _nested(value: Any) -> str:
    if isinstance(value, Mapping):
        rows = []
        for key, member in value.items():
            rows.append(f"<tr><th>{escape(str(key))}</th><td>{_nested(member)}</td></tr>")
        return f"<table>{''.join(rows)}</table>"
    if isinstance(value, list):
        return "<br>".join(map(_nested, value))
    if value is None:
        return ""
    return escape(str(value))
