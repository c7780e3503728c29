"""The arms of an ablation before anything is trained, as text: what they cost and what differs."""

from __future__ import annotations

from collections.abc import Sequence

from lswt_core.ablation.build_arms import BuiltArm
from lswt_core.ablation.match import Matched
from lswt_core.reporting.tables import Table

HEADER = (
    *("arm", "parameters", "", "FLOP/token", "", "training FLOP", ""),
    "differs in",
)


def format_arms(arms: Sequence[BuiltArm], notes: Sequence[str]) -> str:
    """Return the table of arms (the baseline first), with the remarks about each below."""
    table = Table(HEADER, [arm_row(arm, arms[0]) for arm in arms], text_columns=(0, 7))
    remarks = [line for arm in arms for line in arm_remarks(arm)]
    return "\n".join([table.text(), *remarks, *notes])


def arm_row(arm: BuiltArm, baseline: BuiltArm) -> list[str]:
    """Return an arm's costs, each with its difference to the baseline's."""
    own, base = arm.budget, baseline.budget
    return [
        arm.spec.name,
        *format_cost(own.total, base.total, ","),
        *format_cost(own.flops_per_token, base.flops_per_token, ","),
        *format_cost(arm.training_flops, baseline.training_flops, ".3e"),
        ", ".join(arm.axes) or "-",
    ]


def format_cost(own: int | None, base: int | None, form: str) -> tuple[str, str]:
    """Return a cost, and its relative difference to the baseline's."""
    if own is None:
        return "unknown", ""
    if base is None:
        return f"{own:{form}}", ""
    return f"{own:{form}}", f"{own / base - 1:+.2%}"


def arm_remarks(arm: BuiltArm) -> list[str]:
    """Return what is unknown of an arm, how it was matched, and what was allowed to differ."""
    lines = [f"unknown: {what} ({why})" for what, why in arm.budget.unknown.items()]
    if arm.matched is not None:
        lines.append(f"matched by {arm.matched.override}, residual {arm.matched.residual:+.3%}")
        lines += describe_measured(arm.matched)
    lines += [f"allowed: {flaw.text}" for flaw in arm.flaws]
    return [f"  {arm.spec.name}: {line}" for line in lines]


def describe_measured(matched: Matched) -> list[str]:
    """Return by what measurement an arm was matched, if by one."""
    if matched.measured is None:
        return []
    line = f"an update takes {matched.measured['ratio']:.3f} times as long as the baseline's"
    if matched.measured["ci95"] is not None:
        low, high = matched.measured["ci95"]
        line += f" (95 % interval {low:.3f} .. {high:.3f}, timed in turn on this machine)"
    return [line]
