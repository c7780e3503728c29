"""Conversations in JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt, Le

from lswt_core.errors import DataError
from lswt_core.interfaces import DataSource, Document
from lswt_records.files import Records
from lswt_records.jsonl import JsonLines, parse_json, read_lines, value_in

CONTENT, ASSISTANT = "{content}", "assistant"


class Chat(Records, DataSource):
    """Conversations, one JSON object a line, plain or gzipped (.gz): the list in ``field`` has
    messages, which are objects with a "role" and a "content". A document is all of them, written
    as ``form`` says. The contents of ``roles`` (default: assistant) are predicted, with what
    ``form`` has behind a content, so that a model learns to end its turn, and with the document's
    end behind the last; all else is read and not predicted.

    ``paths``, ``valid`` and ``valid_share`` are those of ``jsonl``.
    """

    name = "chat"
    suffixes = JsonLines.suffixes

    def __init__(
        self,
        *,
        paths: list[str],
        field: str = "messages",
        form: str = "<|{role}|>\n{content}\n",
        roles: list[str] | None = None,
        valid: list[str] | None = None,
        valid_share: Annotated[float, Gt(0), Le(0.5)] = 0.03125,
    ) -> None:
        super().__init__(paths, {"field": field}, valid, valid_share)
        if form.count(CONTENT) != 1:
            raise ValueError(f"form {form!r} does not contain {CONTENT} once")
        if roles == []:
            raise ValueError("roles is empty: name whose messages are predicted")
        self.before, _, self.behind = form.partition(CONTENT)
        self.field, self.roles = field, frozenset(roles or [ASSISTANT])
        self.selects_scored = True

    def records(self, file: Path) -> Iterator[Document]:
        """The conversations of a file, named file:line. Raises DataError behind the last if none
        has a message of ``roles``.
        """
        seen: set[str] = set()
        for number, line in read_lines(file):
            if line.strip():
                where = f"{file}:{number}"
                messages = value_in(parse_json(line, where), "field", self.field, where)
                yield self.write(where, messages)
                seen |= {message["role"] for message in messages}
        if seen and not seen & self.roles:
            raise DataError(
                f"{file}: nothing would be predicted: its messages are of {named(seen)}, not of"
                f" {named(self.roles)}; set data.roles"
            )

    def write(self, where: str, messages: Any) -> Document:
        """A conversation as a document."""
        if not isinstance(messages, list):
            raise DataError(
                f"{where}: field {self.field!r} is {json.dumps(messages)[:40]}, not a list of"
                " messages; repair the line or set data.field"
            )
        text, scored = "", []
        for number, message in enumerate(messages, 1):
            role, content = require_message(message, f"{where}: message {number}")
            text += self.before.replace("{role}", role)
            begin = len(text)
            text += content + self.behind.replace("{role}", role)
            end = len(text) + (number == len(messages))
            if role in self.roles and end > begin:
                scored.append((begin, end))
        return Document(where, text, tuple(scored))

    def file_bytes(self, file: Path) -> int | None:
        """The size of a file, JSON included; None if it is compressed."""
        return None if file.suffix == ".gz" else file.stat().st_size

    def fingerprint(self) -> str:
        """A hash of the files, the validation split, and how messages are written."""
        how = (super().fingerprint(), self.before, self.behind, sorted(self.roles))
        return blake2b(repr(how).encode(), digest_size=16).hexdigest()


def named(roles: Iterable[str]) -> str:
    """Roles in a sentence."""
    return ", ".join(map(repr, sorted(roles)))


def require_message(message: Any, where: str) -> tuple[str, str]:
    """A message's role and content. Raises DataError if they are not strings."""
    known = message if isinstance(message, dict) else {}
    role, content = known.get("role"), known.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(
            f"{where} is {json.dumps(message)[:60]}, not an object with the strings"
            ' "role" and "content"; repair or remove the line'
        )
    return role, content
