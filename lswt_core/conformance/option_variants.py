"""Other values of a component's options, one option at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from lswt_core.conformance.subject import Subject
from lswt_core.registry import REQUIRED, Registry


def option_variants(subject: Subject, directory: Path) -> Iterator[tuple[str, Subject]]:
    """The component with another valid value of one option, and what was changed. Files and
    directories that options name are copied to ``directory`` and get another line.
    """
    schema = Registry([]).schema(subject.offer)
    for number, option in enumerate(subject.offer.options):
        value = subject.options.get(option.name, option.default)
        if value is REQUIRED or value is None:
            continue
        for other in other_values(value, option.annotation, directory / str(number)):
            try:
                schema.model_validate(subject.options | {option.name: other})
            except ValidationError:
                continue
            yield f"{option.name} = {other!r}", subject.with_options({option.name: other})


def other_values(value: Any, annotation: Any, directory: Path) -> Iterator[Any]:
    """Values near one: they may be invalid."""
    if get_origin(annotation) is Literal:
        yield from (other for other in get_args(annotation) if other != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value * 2, value / 2 if isinstance(value, float) else value // 2)
    elif isinstance(value, str):
        yield change_file(value, directory) or f"{value}x"
    elif isinstance(value, list) and all(isinstance(path, str) for path in value[:1] or [0]):
        copies = [change_file(path, directory) for path in value[:1]]
        yield from ([copy, *value[1:]] for copy in copies if copy)


def change_file(path: str, directory: Path) -> str | None:
    """A copy of a file, or of a directory with its first file, that has one more line; None if
    there is no such file.
    """
    source, copy = Path(path).expanduser(), directory / Path(path).name
    if source.is_file():
        directory.mkdir(parents=True)
        shutil.copyfile(source, copy)
        changed = copy
    elif source.is_dir():
        shutil.copytree(source, copy)
        files = sorted(one for one in copy.rglob("*") if one.is_file())
        if not files:
            return None
        changed = files[0]
    else:
        return None
    changed.write_bytes(changed.read_bytes() + b"\none more line\n")
    return str(copy)
