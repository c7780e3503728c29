"""Line numbers of the keys in a TOML text, which TOML parsers do not keep."""

from __future__ import annotations

import re
from typing import NamedTuple

import tomli

Key = tuple[str, ...]

TOKEN = re.compile(
    r'(?s)(?P<string>"""(?:\\.|[^\\])*?"""(?!")|\'\'\'.*?\'\'\'(?!\')|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\')'
    r"|(?P<skip>["
    r" \t\r]+|#[^\n]*)|(?P<newline>\n)|(?P<mark>[\[\]{}=,.])|(?P<word>[^\s\[\]{}=,.\"'#]+)"
)


class Token(NamedTuple):
    """A lexical token."""

    text: str
    line: int
    key: bool  # whether it may be part of a key


def index(text: str) -> dict[Key, int]:
    """The line, from 1, of every key and table in a valid TOML text; of a table, where it is first
    named.
    """
    return Scanner(text).lines


def parse_key(text: str) -> Key | None:
    """The parts of a dotted key, e.g. 'memory."my cache".length'; None if it is not one."""
    if "\n" in text or "=" in text:
        return None
    try:
        node, parts = tomli.loads(f"{text} = 0"), []
    except (ValueError, RecursionError):
        return None
    while isinstance(node, dict) and len(node) == 1:
        [(part, node)] = node.items()
        parts.append(part)
    return tuple(parts) if parts and node == 0 else None


class Scanner:
    """Scans a text that a parser has found valid."""

    def __init__(self, text: str) -> None:
        self.tokens = tokens(text)
        self.place = 0
        self.lines: dict[Key, int] = {}
        prefix: Key = ()
        while self.place < len(self.tokens):
            if self.skip("\n"):
                continue
            if self.skip("["):
                self.skip("[")
                prefix = self.key(())
                self.skip("]")
                self.skip("]")
            else:
                self.pair(prefix)

    def peek(self) -> str:
        """The next token's text; empty at the end."""
        return self.tokens[self.place].text if self.place < len(self.tokens) else ""

    def skip(self, mark: str) -> bool:
        """Step over the next token if it is this mark; returns whether it was."""
        is_next = self.place < len(self.tokens) and self.tokens[self.place].text == mark
        if is_next:
            self.place += 1
        return is_next

    def key(self, prefix: Key) -> Key:
        """Read a dotted key and record its line."""
        while self.place < len(self.tokens) and (self.tokens[self.place].key or self.peek() == "."):
            token = self.tokens[self.place]
            self.place += 1
            if token.key:
                prefix += (unquote(token.text),)
                self.lines.setdefault(prefix, token.line)
        return prefix

    def pair(self, prefix: Key) -> None:
        """Read ``key = value``."""
        before = self.place
        path = self.key(prefix)
        self.skip("=")
        self.value(path)
        self.place = max(self.place, before + 1)

    def value(self, path: Key) -> None:
        """Step over a value; record the keys of an inline table."""
        if self.skip("{"):
            while self.place < len(self.tokens) and not self.skip("}"):
                if not (self.skip(",") or self.skip("\n")):
                    self.pair(path)
            return
        depth = 0  # of brackets
        while self.place < len(self.tokens) and (depth or self.peek() not in ("\n", ",", "}")):
            if self.peek() in ("[", "{"):
                depth += 1
            elif self.peek() in ("]", "}"):
                depth -= 1
            self.place += 1


def tokens(text: str) -> list[Token]:
    """Split a text into tokens, without spaces and comments."""
    result, line = [], 1
    for match in TOKEN.finditer(text):
        if match.lastgroup != "skip":
            result.append(Token(match[0], line, match.lastgroup in ("string", "word")))
        line += match[0].count("\n")
    return result


def unquote(part: str) -> str:
    """Remove the quotes of a part of a key."""
    if part[0] in "\"'":
        return tomli.loads(f"key = {part}")["key"]
    return part
