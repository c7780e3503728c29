"""May a new plugin be called that? Every refusal says what is wrong, why, and what to do."""

from __future__ import annotations

import re
from importlib.util import find_spec

from lswt_core.errors import UsageError
from lswt_core.registry import AUTO, Registry, nearest
from lswt_core.registry.kinds import KINDS, Kind

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST = 32  # characters, so that lines that hold a name stay short
# what TOML, and so a recipe's override, does not read as a text
VALUES = ("true", "false", "inf", "nan")


def distribution_of(name: str) -> str:
    """What the package of a component is called in indexes of packages."""
    return f"lswt-{name}"


def module_of(name: str) -> str:
    """What the package of a component is called in imports."""
    return distribution_of(name).replace("-", "_")


def kind_named(text: str) -> Kind:
    """The kind of that name."""
    if text in KINDS:
        return KINDS[text]
    guess = nearest(text, KINDS)
    hint = f'did you mean "{guess}"? ' if guess else ""
    raise UsageError(f'there is no kind of component "{text}"; {hint}The kinds: {", ".join(KINDS)}')


def check_name(kind: Kind, name: str, registry: Registry) -> None:
    """Raise UsageError for a name that is badly formed or taken."""
    check_form(name)
    for offer in (*registry.offers(), AUTO):
        if (offer.kind, offer.name) == (kind.name, name):
            owner = f"{offer.distribution} {offer.version}" + (
                f" ({offer.source})" if offer.source else ""
            )
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
    """Raise UsageError for what cannot be written everywhere a name is written."""
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        form = (
            f"lower-case letters and digits with single dashes between words, at most {LONGEST}"
            " characters"
        )
        words = "-".join(
            re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower())
        )[:LONGEST].strip("-")
        example = words if NAME.fullmatch(words) else "my-variant"
        raise UsageError(
            f"the name {name!r} cannot be used: a name is {form}, because recipes and package names"
            f" hold it; e.g. {example}"
        )
    if name in VALUES:
        raise UsageError(
            f'the name "{name}" cannot be used: recipes read it as a value, not as a name; e.g.'
            f" my-{name}"
        )


def check_package(name: str, registry: Registry) -> None:
    """Raise UsageError if another package has the name that this one's would have."""
    module, distribution = module_of(name), distribution_of(name)
    owner = next(
        (
            f"{entry.distribution} {entry.version}"
            for entry in registry.entries
            if entry.module == module
        ),
        None,
    )
    if owner is None and (spec := find_spec(module)) is not None:
        owner = str(spec.origin)
    if owner is not None:
        example = f"my-{name}"[:LONGEST]
        raise UsageError(
            f"the package {distribution} would hold the module {module}, which exists already"
            f" ({owner}); e.g. {example}"
        )
