"""A new plugin package: four files, of which a person must read two, around a component that works
at once.
"""

from __future__ import annotations

import keyword
import re
import shutil
from importlib import resources
from pathlib import Path

from lswt_core.cli.scaffold import texts
from lswt_core.cli.scaffold.names import check_name, distribution_of, kind_named, module_of
from lswt_core.errors import UsageError
from lswt_core.registry import Registry
from lswt_core.registry.kinds import Kind

__all__ = ["commands", "create", "distribution_of", "kind_named", "module_of"]


def create(kind: Kind, name: str, parent: Path, registry: Registry) -> Path:
    """Write the package ``lswt-NAME`` into a directory; returns where it is. Nothing that exists is
    written over, and nothing half written is left. Raises UsageError for a name or place that
    cannot be used.
    """
    check_name(kind, name, registry)
    folder = parent / distribution_of(name)
    if not parent.is_dir():
        raise UsageError(
            f"{parent} is no directory, so no package can be put there; make it, or name another"
            " with --in DIR"
        )
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise UsageError(
            f"{folder} exists and is not written over; remove it, or choose another name or"
            " --in DIR"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be made: {error.strerror}; choose another place with --in DIR"
        ) from error
    try:
        for file, text in files(kind, name).items():
            folder.joinpath(file).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}; make room, or choose another place with"
            " --in DIR"
        ) from error
    return folder


def files(kind: Kind, name: str) -> dict[str, str]:
    """The files of the package and their text."""
    module, use = module_of(name), "\n".join(commands(kind, name))
    return {
        "pyproject.toml": filled(texts.PYPROJECT, kind, name),
        f"{module}.py": component(kind, name),
        "README.md": filled(texts.README, kind, name).replace("@USE@", use),
        f"test_{module}.py": filled(texts.TEST, kind, name),
    }


def component(kind: Kind, name: str) -> str:
    """The example of a kind under another name."""
    text = (
        resources.files("lswt_core.cli.scaffold.examples")
        .joinpath(f"{kind.name}.py")
        .read_text(encoding="utf-8")
    )
    text = re.sub(r"\bExample\b", class_name(name, text), text)
    text = text.replace("lswt_example", module_of(name)).replace(
        "lswt-example", distribution_of(name)
    )
    return text.replace('"example"', f'"{name}"')


def class_name(name: str, text: str) -> str:
    """A class's name in a text that does not use it yet: my-variant -> MyVariant."""
    camel = "".join(word.capitalize() for word in name.split("-"))
    return (
        f"{camel}Component"
        if camel in re.findall(r"\w+", text) or keyword.iskeyword(camel)
        else camel
    )


def commands(kind: Kind, name: str) -> list[str]:
    """How the component is tried, and whether it is worth it found out."""
    use = texts.USES.get(kind.name) or texts.Use(f"{kind.table}.use=@NAME@", f"{kind.table}=@NAME@")
    lines = [texts.RUN.replace("@OVERRIDES@", use.overrides)]
    if use.swap is not None:
        lines.append(texts.ABLATE.replace("@SWAP@", use.swap))
    return [filled(line, kind, name) for line in lines]


def filled(text: str, kind: Kind, name: str) -> str:
    """A text with the names in it."""
    marks = {"NAME": name, "MODULE": module_of(name), "DISTRIBUTION": distribution_of(name)}
    for mark, value in (marks | {"KIND": kind.name, "INTERFACE": kind.interface}).items():
        text = text.replace(f"@{mark}@", value)
    return text
