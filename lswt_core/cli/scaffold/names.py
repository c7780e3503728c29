"""Names of new plugins, and which names are refused."""

from __future__ import annotations

import re
from importlib.util import find_spec

from lswt_core.errors import UsageError
from lswt_core.registry import AUTO, Registry, nearest
from lswt_core.registry.kinds import KINDS, Kind

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
MAX_LENGTH = 32  # characters
# Bare words that a recipe override does not read as a string.
TOML_VALUES = ("true", "false", "inf", "nan")


def distribution_of(name: str) -> str:
    """The distribution name of a component's package."""
    return f"lswt-{name}"


def module_of(name: str) -> str:
    """The import name of a component's package."""
    return distribution_of(name).replace("-", "_")


def kind_named(text: str) -> Kind:
    """The kind of a name. Raises UsageError if there is none."""
    if text in KINDS:
        return KINDS[text]
    guess = nearest(text, KINDS)
    hint = f'did you mean "{guess}"? ' if guess else ""
    raise UsageError(f'there is no kind of component "{text}"; {hint}The kinds: {", ".join(KINDS)}')


def check_name(kind: Kind, name: str, registry: Registry) -> None:
    """Raise UsageError for a name that is malformed or taken."""
    check_form(name)
    for offer in (*registry.offers(), AUTO):
        if (offer.kind, offer.name) == (kind.name, name):
            owner = f"{offer.distribution} {offer.version}"
            if offer.source:
                owner += f" ({offer.source})"
            raise UsageError(
                f'the {kind.name} "{name}" exists already, in {owner}; choose another name, or'
                " uninstall that package"
            )
    for broken in registry.broken():
        if broken.entry == name:
            raise UsageError(
                f'a broken plugin claims the name "{name}": {broken}; choose another name, or'
                " uninstall that package"
            )
    check_package(name, registry)


def check_form(name: str) -> None:
    """Raise UsageError unless the name fits recipes, package names and modules."""
    if not NAME.fullmatch(name) or len(name) > MAX_LENGTH:
        form = (
            f"lower-case letters and digits with single dashes between words, at most {MAX_LENGTH}"
            " characters"
        )
        raise UsageError(
            f"the name {name!r} cannot be used: a name is {form}, because recipes and package names"
            f" contain it; e.g. {suggest_name(name)}"
        )
    if name in TOML_VALUES:
        raise UsageError(
            f'the name "{name}" cannot be used: recipes read it as a value, not as a name; e.g.'
            f" my-{name}"
        )


def suggest_name(name: str) -> str:
    """A well-formed name close to a malformed one: MyVariant -> my-variant."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()
    suggestion = "-".join(re.findall(r"[a-z0-9]+", spaced))[:MAX_LENGTH].strip("-")
    if NAME.fullmatch(suggestion):
        return suggestion
    return "my-variant"


def check_package(name: str, registry: Registry) -> None:
    """Raise UsageError if the package's module exists already."""
    module, distribution = module_of(name), distribution_of(name)
    owners = [
        f"{entry.distribution} {entry.version}"
        for entry in registry.entries
        if entry.module == module
    ]
    if not owners:
        spec = find_spec(module)
        if spec is not None:
            owners.append(str(spec.origin))
    if owners:
        example = f"my-{name}"[:MAX_LENGTH]
        raise UsageError(
            f"the package {distribution} would contain the module {module}, which exists already"
            f" ({owners[0]}); choose another name, e.g. {example}"
        )
