"""A document as a list of sections, written as a page, as Markdown or as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from lswt_core.reporting.html import bullet_list, code, image, page, section
from lswt_core.reporting.tables import Table


class Sentences(NamedTuple):
    """Findings: paragraphs of a page."""

    lines: Sequence[str]


class Bullets(NamedTuple):
    """A list of sentences."""

    lines: Sequence[str]


class Code(NamedTuple):
    """Preformatted text."""

    text: str
    language: str = ""


class Picture(NamedTuple):
    """A picture beside the document, by file name; ``alt`` says in words what it shows."""

    file: str
    alt: str
    narrow: bool = False  # legible in a narrow window


Part = Sentences | Bullets | Code | Picture | Table


class Section(NamedTuple):
    """A part of a document; one without content is left out."""

    title: str  # "": it goes on without a heading
    parts: Sequence[Part | None]
    folded: bool = False  # in a page, a click opens it
    printed: bool = False  # on the terminal too

    def content(self) -> list[Part]:
        """Return the parts that are not empty."""
        return [part for part in self.parts if part is not None and not is_empty(part)]


def is_empty(part: Part) -> bool:
    """Whether a part has nothing to show."""
    if isinstance(part, Table):
        return not part.rows
    return not part[0]


# ---------- a page


def render_page(title: str, sections: Iterable[Section], pictures: Mapping[str, bytes]) -> str:
    """Return a page that loads nothing else; ``pictures`` (PNG) by file name."""
    bodies = [f"<h1>{escape(title)}</h1>"]
    for one in sections:
        body = "".join(part_html(part, pictures, one.folded) for part in one.content())
        heading = escape(one.title)
        bodies.append(section(heading, body, folded=one.folded) if heading else body)
    return page(escape(title), bodies)


def part_html(part: Part, pictures: Mapping[str, bytes], folded: bool) -> str:
    """Return a part in HTML; tables that are not ``folded`` fit a narrow window."""
    match part:
        case Table():
            return part.html(stacked=not folded)
        case Sentences(lines):
            return "".join(f'<p class="verdict">{escape(line)}</p>' for line in lines)
        case Bullets(lines):
            return bullet_list(lines)
        case Code(text):
            return code(text)
        case Picture(file, alt, narrow):
            return image(pictures[file], alt, narrow=narrow)


# ---------- Markdown


def render_markdown(title: str, sections: Iterable[Section]) -> str:
    """Return the document in Markdown; pictures lie beside it."""
    texts = [f"# {title}"]
    for one in sections:
        parts = [part_markdown(part) for part in one.content()]
        if parts and one.title:
            texts.append(f"## {one.title}")
        texts += parts
    return "\n\n".join(texts) + "\n"


def part_markdown(part: Part) -> str:
    """Return a part in Markdown."""
    match part:
        case Table():
            return part.markdown()
        case Sentences(lines) | Bullets(lines):
            return "\n".join(f"- {line}" for line in lines)
        case Code(text, language):
            return f"```{language}\n{text}\n```"
        case Picture(file, alt):
            return f"![{alt}]({file})"


# ---------- a terminal


def render_text(sections: Iterable[Section]) -> str:
    """Return the sections that are printed."""
    texts = []
    for one in sections:
        parts = [part_text(part) for part in one.content()] if one.printed else []
        if any(parts):
            texts.append("\n".join(filter(None, [one.title, *parts])))
    return "\n\n".join(texts)


def part_text(part: Part) -> str:
    """Return a part as plain text; empty for a picture."""
    match part:
        case Table():
            return part.text()
        case Sentences(lines):
            return "\n".join(lines)
        case Bullets(lines):
            return "\n".join(f"- {line}" for line in lines)
        case Code(text):
            return text
        case Picture():
            return ""
