"""A conformance check: one property that a component must have, why, and how to fix a violation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple
from unittest import SkipTest

import torch

from lswt_core.conformance.subject import Subject


class Violation(Exception):
    """What a rule found wrong. ``Check`` adds why it matters and how to fix it."""


class Failed(AssertionError):
    """A component does not do what its interface promises."""


class Rule(NamedTuple):
    """A check of every component of some kinds."""

    name: str
    kinds: frozenset[str]
    why: str
    fix: str
    after: tuple[str, ...]  # rules that this one presupposes: it is skipped if one of them fails
    function: Callable[[Subject], None]


RULES: list[Rule] = []


def rule(
    name: str, kinds: Iterable[str], *, why: str, fix: str, after: Iterable[str] = ()
) -> Callable[..., Callable[[Subject], None]]:
    """Register a function as the check of components of some kinds."""

    def register(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        RULES.append(Rule(name, frozenset(kinds), why, fix, tuple(after), function))
        return function

    return register


def require(condition: object, message: str) -> None:
    """Raise Violation with the message unless the condition holds."""
    if not condition:
        raise Violation(message)


PRESUPPOSES = "presupposes"


class Result(NamedTuple):
    """The result of a check."""

    outcome: str  # "ok", "FAILED", "skipped"
    message: str
    seconds: float = 0.0

    @property
    def blocking(self) -> bool:
        """Whether checks that presuppose this one are skipped."""
        return self.outcome == "FAILED" or self.message.startswith(PRESUPPOSES)


def describe(error: BaseException, subject: Subject) -> str:
    """An exception in one line, with the place in a plugin's code that raised it."""
    culprit = subject.registry.culprit(error)
    raised = f"{type(error).__name__}: {error}".strip()
    place = "" if culprit is None else f" (in {culprit.method}, {culprit.where})"
    return f"{raised}{place}{DTYPE_HINT if is_dtype_mismatch(error) else ''}"


# In torch's messages about operands of two dtypes, float is float32 and double is float64.
DTYPE_HINT = (
    "; it is checked in float64: where float32 is the least to compute in, as in x.float(), write"
    " x.to(torch.promote_types(x.dtype, torch.float32)), and return to x.dtype afterwards"
)


def is_dtype_mismatch(error: BaseException) -> bool:
    """Whether float32 met float64."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "float" in text and "double" in text


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: tiny tensors are slower on many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Check:
    """A rule applied to one component. Calling it raises Failed if the component violates the rule,
    and unittest.SkipTest, with the reason, if the rule does not apply here.
    """

    def __init__(self, rule: Rule, subject: Subject, siblings: dict[str, Check]) -> None:
        self.rule, self.subject, self._siblings = rule, subject, siblings
        self._result: Result | None = None

    def __str__(self) -> str:
        return f"{self.subject}: {self.rule.name}"

    def __call__(self) -> None:
        """Run the check; raise Failed or SkipTest unless it passes."""
        result = self.result()
        if result.outcome == "FAILED":
            raise Failed(self.report())
        if result.outcome == "skipped":
            raise SkipTest(result.message)

    def report(self) -> str:
        """The result with the reason for the rule and how to fix a violation."""
        return (
            f"{self}\n  found: {self.result().message}"
            f"\n  why it matters: {self.rule.why}\n  fix: {self.rule.fix}"
        )

    def result(self) -> Result:
        """Run the check at the first call; later calls return the same result."""
        if self._result is None:
            start = perf_counter()
            self._result = self._run()._replace(seconds=perf_counter() - start)
        return self._result

    def _run(self) -> Result:
        for name in self.rule.after:
            if name in self._siblings and self._siblings[name].result().blocking:
                return Result("skipped", f"{PRESUPPOSES} the check {name!r}, which failed")
        try:
            with one_thread():
                self.rule.function(self.subject)
        except SkipTest as reason:
            return Result("skipped", str(reason))
        except Violation as violation:
            return Result("FAILED", str(violation))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too
            return Result("FAILED", describe(error, self.subject))
        return Result("ok", "")


def checks_of(subject: Subject) -> list[Check]:
    """All checks of a component."""
    checks: dict[str, Check] = {}
    for rule in RULES:
        if subject.kind in rule.kinds:
            checks[rule.name] = Check(rule, subject, checks)
    return list(checks.values())
