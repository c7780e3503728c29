"""The details of a ladder's results as text: trend, law, next size and back-test."""

from __future__ import annotations

from collections.abc import Callable

from lswt_core.ablation.report.ladder_text import Entry, format_ends, format_percent, format_worth
from lswt_core.ablation.report.loss_tables import Report, format_difference


def list_details(report: Report) -> list[str]:
    """Return trend, law, next size and back-test of every arm."""
    lines = []
    for one in report["ladder"]["arms"]:
        described = [describe_trend(one), describe_law(one), describe_sensitivity(one)]
        described += [describe_next(one), describe_back_test(one, report["ladder"]["rungs"])]
        lines += [f"{one['arm']}: {line}" for line in described if line]
    return lines


def describe_trend(one: Entry) -> str:
    """Return how an arm's gain changes with compute."""
    trend = one["trend"]
    if trend is None:
        return ""
    factor, nats = trend["factor_per_decade"], trend["nats"]
    slope = f"{format_difference(nats['slope'])} nats"
    if nats["ci95"] is not None:
        slope += f" ({' to '.join(map(format_difference, nats['ci95']))})"
    p = "" if trend["p"] is None else f", p {trend['p_holm']:.2g} (Holm)"
    return (
        f"per tenfold compute, what it is worth changes by {format_worth(factor)}{p}, and the"
        f" difference by {slope}."
    )


def describe_law(one: Entry) -> str:
    """Return the law of baseline and arm, and whether its irreducible loss is known."""
    law = one["law"]
    if law is None or law["alpha"]["value"] is None:
        return ""
    l_inf, alpha, (base, arm) = law["l_inf"]["value"], law["alpha"]["value"], law["a"]
    text = (
        f"L = {l_inf:.2f} + A (C / {law['reference_flops']:.3g})^-{alpha:.3g}, A"
        f" {base['value']:.4g} for the baseline and {arm['value']:.4g} for the arm (L_inf and alpha"
        " are taken to be the same for both)"
    )
    if law["l_inf_fixed"] is not None:
        return f"{text}; two sizes cannot fit L_inf, which is taken for half of the lowest loss."
    return f"{text}; {describe_l_inf(law['l_inf'])}."


def describe_l_inf(l_inf: Entry) -> str:
    """Return whether the irreducible loss is identified, in words."""
    if l_inf["ci95"] is None or None in l_inf["ci95"]:
        return "L_inf is not identified: its interval is unknown"
    low, high = l_inf["ci95"]
    span = f"{low:.2g} to {high:.2g}"
    if low == 0.0 or high > 2 * low:
        return f"L_inf is not identified by so few sizes: anything from {span} fits"
    return f"L_inf 95 % interval {span}"


def describe_sensitivity(one: Entry) -> str:
    """Return what an arm is worth for other values of the irreducible loss."""
    if one["speedup"] is None:
        return ""
    entries = [entry for entry in one["speedup"]["if_l_inf"] if entry["value"] is not None]
    parts = [f"{format_percent(entry['value'])} if {entry['l_inf']:.3g}" for entry in entries]
    return f"worth of compute by what L_inf is: {', '.join(parts)}." if parts else ""


def describe_next(one: Entry) -> str:
    """Return what is expected at the next size."""
    found = one["next"]
    if found is None or found["difference"]["value"] is None:
        return ""
    return (
        f"at the next size, {found['flops']:.2e} FLOPs, if law and trend go on:"
        f" {format_difference(found['difference']['value'])} nats"
        f" ({format_ends(found['difference'], show_difference)}), worth"
        f" {format_worth(found['speedup'])} of compute."
    )


def show_difference(value: float | None) -> str:
    """Return a difference; one without bound is infinite."""
    return "unbounded" if value is None else format_difference(value)


def describe_back_test(one: Entry, rungs: list[Entry]) -> str:
    """Return how well the largest size was predicted from the others."""
    found = one["back_test"]
    if found is None or found["difference"]["error"] is None:
        return ""
    difference = describe_prediction(found["difference"], show_difference)
    baseline = describe_prediction(found["baseline"], show_loss)
    same = "the same" if found["same_verdict"] else f"another: {found['verdict']}"
    text = (
        f"back-test: without {rungs[-1]['name']}, the difference is predicted as {difference}; the"
        f" baseline's loss as {baseline}; the verdict would have been {same}."
    )
    if found["l_inf"]:
        low, high = min(found["l_inf"]), max(found["l_inf"])
        text += (
            f" (Two sizes cannot fit L_inf: predictions take it for {found['l_inf'][0]:.2g},"
            f" intervals for anything from {low:.2g} to {high:.2g}, so that this test is weak.)"
        )
    return text


def describe_prediction(part: Entry, show: Callable[[float | None], str]) -> str:
    """Return a prediction with its interval, which has the noise of what was observed in it, and
    what was observed.
    """
    predicted, observed = part["predicted"], part["observed"]
    if part["ci95"] is None:
        return f"{show(predicted)} (no interval), and is {show(observed)}"
    ends = [None if end is None else observed + end for end in part["ci95"]]
    inside = "inside" if part["covered"] else "OUTSIDE"
    interval = format_ends({"ci95": ends}, show)
    return f"{show(predicted)} ({interval}), and is {show(observed)}, {inside}"


def show_loss(value: float | None) -> str:
    """Return a loss; one without bound is infinite."""
    return "unbounded" if value is None else f"{value:.4f}"
