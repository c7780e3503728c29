"""What a check is: a named question to a component, why it is asked, and how to mend what fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import NamedTuple
from unittest import SkipTest

from lswt_core.conformance.subject import Subject


class Broken(Exception):
    """What a check found; ``Check`` says besides why it matters and how to mend it."""


class Failed(AssertionError):
    """A component does not do what its interface promises."""


class Rule(NamedTuple):
    """A check as it is written down: one function for every component of some kinds."""

    name: str
    kinds: frozenset[str]
    why: str
    mend: str
    # checks that it presupposes: where one of them fails, this one says nothing
    after: tuple[str, ...]
    function: Callable[[Subject], None]


RULES: list[Rule] = []


def rule(
    name: str, kinds: Iterable[str], *, why: str, mend: str, after: Iterable[str] = ()
) -> Callable[..., Callable[[Subject], None]]:
    """Register a check for components of some kinds."""

    def register(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        RULES.append(Rule(name, frozenset(kinds), why, mend, tuple(after), function))
        return function

    return register


def require(fact: object, told: str) -> None:
    """Raise Broken, telling what was found, unless something is so."""
    if not fact:
        raise Broken(told)


PRESUPPOSES = "presupposes"


class Result(NamedTuple):
    """What a check came to."""

    outcome: str  # "ok", "FAILED", "skipped"
    told: str
    seconds: float = 0.0

    @property
    def blocking(self) -> bool:
        """Whether checks that presuppose this one can say nothing."""
        return self.outcome == "FAILED" or self.told.startswith(PRESUPPOSES)


class Check:
    """A rule applied to one component. Calling it raises Failed, or unittest.SkipTest with the
    reason where it cannot be asked.
    """

    def __init__(self, rule: Rule, subject: Subject, siblings: dict[str, Check]) -> None:
        self.rule, self.subject, self._siblings = rule, subject, siblings
        self._result: Result | None = None

    def __str__(self) -> str:
        return f"{self.subject}: {self.rule.name}"

    def __call__(self) -> None:
        """Ask, and raise what there is to say."""
        result = self.result()
        if result.outcome == "FAILED":
            raise Failed(self.told())
        if result.outcome == "skipped":
            raise SkipTest(result.told)

    def told(self) -> str:
        """The outcome in full."""
        return (
            f"{self}\n  found: {self.result().told}\n  why it matters: {self.rule.why}\n  to mend:"
            f" {self.rule.mend}"
        )

    def result(self) -> Result:
        """The outcome; asked once, remembered afterwards."""
        if self._result is None:
            began = perf_counter()
            self._result = self._ask()._replace(seconds=perf_counter() - began)
        return self._result

    def _ask(self) -> Result:
        for name in self.rule.after:
            if name in self._siblings and self._siblings[name].result().blocking:
                return Result("skipped", f"{PRESUPPOSES} the check {name!r}, which failed")
        try:
            self.rule.function(self.subject)
        except SkipTest as reason:
            return Result("skipped", str(reason))
        except Broken as found:
            return Result("FAILED", str(found))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too
            return Result("FAILED", f"{type(error).__name__}: {error}".strip())
        return Result("ok", "")


def checks_of(subject: Subject) -> Iterator[Check]:
    """All checks of a component, those that others presuppose first."""
    made: dict[str, Check] = {}
    for one in RULES:
        if subject.kind in one.kinds:
            made[one.name] = Check(one, subject, made)
    yield from made.values()
