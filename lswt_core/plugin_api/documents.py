"""Documents that begin with a prompt, and reading on where a data source's state says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from lswt_core.interfaces import DataSource, Document


def prompted(name: str, text: str, prompt: str | None = None) -> Document:
    """A document of a prompt, which is read and not predicted, and a text behind it, which is
    predicted with its end. None: there is no prompt, and all is predicted.
    """
    if prompt is None:
        return Document(name, text)
    whole = prompt + text
    return Document(name, whole, ((len(prompt), len(whole) + 1),))


def documents_after(
    source: DataSource, split: Literal["train", "valid"], state: Any
) -> Iterator[Document]:
    """The documents of a split after a ``DataSource.state()``; all of them if it is None."""
    if state is None:
        return iter(source.documents(split))
    read: Any = source.documents  # takes ``after`` where the source has states
    return iter(read(split, after=state))
