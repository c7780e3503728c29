"""``python -m lswt_core plugins check PACKAGE|FILE``: does a plugin keep what its interfaces
promise?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lswt_core.errors import PluginError, UsageError
from lswt_core.recipe.overrides import parse_value
from lswt_core.registry import Offer, Registry, nearest

if TYPE_CHECKING:
    from lswt_core.conformance import Check


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "target",
        metavar="PACKAGE|FILE",
        help="a distribution, its module (lswt_fading), or the path of a .py file",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="CHECK",
        help="run this check alone, and those it depends on",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option for the components that have it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def check(arguments: argparse.Namespace) -> int:
    """Run all checks; exit code 3 if one fails."""
    from lswt_core.conformance import checks  # imports torch

    options = dict(map(pair, arguments.option))
    all_checks = checks(arguments.target, **options)
    require_options(
        options, list({str(one.subject): one.subject.offer for one in all_checks}.values())
    )
    names = {one.rule.name for one in all_checks}
    if unknown := [name for name in arguments.only if name not in names]:
        raise UsageError(f"no check is called {unknown[0]!r}; there are {', '.join(sorted(names))}")
    chosen = [one for one in all_checks if not arguments.only or one.rule.name in arguments.only]
    if arguments.json:
        print(json.dumps([as_json(one) for one in chosen], indent=2))
    else:
        show(chosen)
    return PluginError.exit_code if any(one.result().outcome == "FAILED" for one in chosen) else 0


def require_options(given: Mapping[str, Any], offers: Sequence[Offer]) -> None:
    """Raise UsageError for an option that no component has, or a value that one that has it does
    not take.
    """
    known = list(dict.fromkeys(option.name for offer in offers for option in offer.options))
    for name in given:
        if name not in known:
            guess = f"; did you mean {near}?" if (near := nearest(name, known)) else ""
            there = ", ".join(known) or "none"
            raise UsageError(f"--option {name}: no component has it{guess} Options are: {there}")
    for offer in offers:
        own = {option.name: given[option.name] for option in offer.options if option.name in given}
        for problem in problems_of(own, offer):
            if problem["loc"][0] in own:
                raise UsageError(f"--option {problem['loc'][0]} of {offer.name}: {problem['msg']}")


def problems_of(given: Mapping[str, Any], offer: Offer) -> list[Any]:
    """The validation errors of some options of a component, as pydantic reports them."""
    from lswt_core.conformance.inner_components import as_tables  # imports torch

    try:
        Registry([]).schema(offer).model_validate(as_tables(offer, given))
    except ValidationError as error:
        return error.errors()
    return []


def pair(word: str) -> tuple[str, Any]:
    """Parse KEY=VALUE. Raises UsageError."""
    key, equals, value = word.partition("=")
    if not equals:
        raise UsageError(f"--option {word}: write KEY=VALUE")
    return key, parse_value(value)


def as_json(one: Check) -> dict[str, Any]:
    """A check's outcome as plain data."""
    result = one.result()
    about = {
        "component": str(one.subject),
        "check": one.rule.name,
        "outcome": result.outcome,
        "seconds": round(result.seconds, 3),
    }
    return about | {"found": result.message, "why": one.rule.why, "fix": one.rule.fix}


def show(chosen: list[Check]) -> None:
    """Print a line for every check as it ends, then the failures in full."""
    width = max(len(str(one)) for one in chosen)
    for one in chosen:
        result = one.result()
        note = f"  {result.message}" if result.outcome == "skipped" else ""
        print(f"{one!s:<{width}}  {result.outcome:<7}  {result.seconds:5.1f} s{note}", flush=True)
    outcomes = [one.result().outcome for one in chosen]
    print("".join(f"\n{one.report()}\n" for one in chosen if one.result().outcome == "FAILED"))
    print(
        f"{outcomes.count('ok')} ok, {outcomes.count('FAILED')} failed, {outcomes.count('skipped')}"
        " skipped"
    )
