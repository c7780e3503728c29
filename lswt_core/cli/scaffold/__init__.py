"""Write a new plugin package around a small component that works."""

from __future__ import annotations

import keyword
import re
import shutil
from importlib import resources
from pathlib import Path

from lswt_core.cli.scaffold import texts
from lswt_core.cli.scaffold.names import check_name, distribution_of, kind_named, module_of
from lswt_core.errors import UsageError
from lswt_core.plugin_api.atomic_write import make_output_directory
from lswt_core.registry import Registry
from lswt_core.registry.kinds import Kind

__all__ = ["commands", "create", "distribution_of", "kind_named", "module_of"]


def create(kind: Kind, name: str, parent: Path, registry: Registry) -> Path:
    """Write the package ``lswt-NAME`` into ``parent``, which need not exist; returns its folder.
    Never overwrites, and removes what it wrote if it fails. Raises UsageError for an unusable name
    or directory.
    """
    check_name(kind, name, registry)
    folder = parent / distribution_of(name)
    make_output_directory(parent, "--in")
    try:
        folder.mkdir()
    except FileExistsError as error:
        raise UsageError(
            f"{folder} exists and is not overwritten; remove it, or choose another name or --in DIR"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be created: {error.strerror}; choose another directory with --in DIR"
        ) from error
    try:
        for file, text in package_files(kind, name).items():
            folder.joinpath(file).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UsageError(
            f"{folder} cannot be written: {error.strerror}; free disk space, or choose another"
            " directory with --in DIR"
        ) from error
    return folder


def package_files(kind: Kind, name: str) -> dict[str, str]:
    """The files of the package by name."""
    module = module_of(name)
    readme = fill(texts.README, kind, name).replace("@USE@", "\n".join(commands(kind, name)))
    return {
        "pyproject.toml": fill(texts.PYPROJECT, kind, name),
        f"{module}.py": component_source(kind, name),
        "README.md": readme,
        f"test_{module}.py": fill(texts.TEST, kind, name),
    }


def component_source(kind: Kind, name: str) -> str:
    """The source of a kind's example, renamed."""
    example = resources.files("lswt_core.cli.scaffold.examples") / f"{kind.name}.py"
    text = example.read_text(encoding="utf-8")
    text = re.sub(r"\bExample\b", class_name(name, text), text)
    text = text.replace("lswt_example", module_of(name))
    text = text.replace("lswt-example", distribution_of(name))
    return text.replace('"example"', f'"{name}"')


def class_name(name: str, text: str) -> str:
    """A class name that the text does not use yet: my-variant -> MyVariant."""
    camel = "".join(word.capitalize() for word in name.split("-"))
    if camel in re.findall(r"\w+", text) or keyword.iskeyword(camel):
        return f"{camel}Component"
    return camel


def commands(kind: Kind, name: str) -> list[str]:
    """Commands that train with the component, and that ablate it."""
    default = texts.Use(f"{kind.table}.use=@NAME@", f"{kind.table}=@NAME@")
    use = texts.USES.get(kind.name, default)
    lines = [texts.RUN.replace("@OVERRIDES@", use.overrides)]
    if use.swap is not None:
        lines.append(texts.ABLATE.replace("@SWAP@", use.swap))
    return [fill(line, kind, name) for line in lines]


def fill(text: str, kind: Kind, name: str) -> str:
    """Replace the placeholders of a template."""
    values = {
        "NAME": name,
        "MODULE": module_of(name),
        "DISTRIBUTION": distribution_of(name),
        "KIND": kind.name,
        "INTERFACE": kind.interface,
    }
    for placeholder, value in values.items():
        text = text.replace(f"@{placeholder}@", value)
    return text
