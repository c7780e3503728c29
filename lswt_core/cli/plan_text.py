"""A plan (what ``plan`` measures) as text for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from textwrap import fill, indent
from typing import Any

from lswt_core.reporting.tables import LINE_WIDTH

UNKNOWN = "unknown"
PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def text(estimate: Mapping[str, Any]) -> str:
    """A plan, section by section."""
    run = estimate["run"]
    head = (
        f"{estimate['recipe']} on {estimate['device']}, {estimate['precision']}, attention"
        f" {estimate['attention']['backend']}"
    )
    sections = [
        [head],
        ["parameters", *parameter_lines(estimate["parameters"])],
        [
            f"memory of one process, {run['micro_batch_size']} rows at a time",
            *memory_lines(estimate),
        ],
        *placement_sections(estimate),
        [
            "work of a token",
            *work_lines(estimate["flops"]),
        ],
        ["run", *run_lines(run, estimate["time"])],
    ]
    if estimate["unknown"]:
        sections.append(
            [UNKNOWN, *(f"  {what}: {why}" for what, why in estimate["unknown"].items())]
        )
    return "\n\n".join("\n".join(lines) for lines in sections)


def line(name: str, value: str, note: str = "") -> str:
    """A row of two columns and a remark."""
    return f"  {name:<28}{value:>20}{f'  {note}' if note else ''}"


def parameter_lines(numbers: Mapping[str, Any]) -> list[str]:
    """Numbers of parameters."""
    trained = numbers["trainable_by_component"]
    rows = [
        line(name, f"{n:,}", "" if trained[name] == n else "not trained")
        for name, n in numbers["by_component"].items()
    ]
    total, active = numbers["total"], numbers["active"]
    rows.append(line("total", f"{total:,}"))
    if active != total:
        rows.append(line("active", f"{active:,}", "those that a token uses"))
    return [*rows, line("trainable", f"{numbers['trainable']:,}")]


def memory_lines(estimate: Mapping[str, Any]) -> list[str]:
    """Bytes, and what to do if they are too many."""
    from lswt_core.budget.memory import advice
    from lswt_core.reporting.units import format_bytes

    need = estimate["memory"]
    rows = [
        line(name, format_bytes(size)) for name, size in need.items() if name != "largest_micro"
    ]
    if need["total"] > need["available"]:
        largest = need["largest_micro"]
        verdict = f"does not fit: micro-batch <= {largest}" if largest else "does not fit"
        rows.append(indent(fill(f"{verdict}; {advice(largest)}", LINE_WIDTH), "  "))
    return [*rows, *remedy_lines(estimate)]


def remedy_lines(estimate: Mapping[str, Any]) -> list[str]:
    """What would make a run fit, the fastest first."""
    from lswt_core.reporting.units import format_bytes, format_duration

    rows = [
        f"  {' '.join(one['overrides'])}: {format_bytes(one['total'])},"
        f" {format_duration(one['seconds_per_step'])} a step"
        for one in estimate["remedies"]
    ]
    return ["  would fit, the fastest first (estimated):", *rows] if rows else []


def placement_sections(estimate: Mapping[str, Any]) -> list[list[str]]:
    """How several processes share the model, and what they keep on their hosts."""
    from lswt_core.reporting.units import format_bytes

    mesh, host, sections = estimate["mesh"], estimate["host"], []
    is_shared = estimate["run"]["ranks"] > 1
    if is_shared:
        count, shards = mesh["replicas"], mesh["shards"]
        sections.append(["mesh", line("replicas", str(count)), line("shards of each", str(shards))])
    if host["memories"] or (is_shared and host["total"]):
        note = f"{host['processes_per_machine']} processes"
        rows = [line(name, format_bytes(host[name])) for name in ("memories", "checkpoint")]
        rows.append(line("of one machine", format_bytes(host["machine"]), note))
        sections.append(["host memory of one process", *rows])
    return sections


def communication_lines(run: Mapping[str, Any], taken: Mapping[str, Any]) -> list[str]:
    """What processes send each other, and on what assumptions."""
    from lswt_core.reporting.units import format_bytes, format_duration

    sent, rows = taken["communication"], []
    rates = {name: f"{unit(n)}B/s" for name, n in sent["assumed_bytes_per_second"].items()}
    if run["ranks"] > 1:
        within, between = sent["bytes_within_replicas"], sent["bytes_between_replicas"]
        rows.append(
            f"  a process sends {format_bytes(within)} a step at {rates['within_replicas']} and"
            f" {format_bytes(between)} between replicas at {rates['between_replicas']}:"
            f" {format_duration(sent['seconds_per_step'])}"
        )
    if sent["bytes_to_host"]:
        seconds = format_duration(sent["streaming_seconds_per_step"])
        rows.append(
            f"  memories: {format_bytes(sent['bytes_to_host'])} a step to the host and back at"
            f" {rates['to_host']}: {seconds}"
        )
    if rows:
        computing = format_duration(sent["computing_seconds_per_step"])
        rows.append(f"  assumed to overlap with {computing} of computing: the longest counts")
    return rows


def work_lines(work: Mapping[str, Any] | None) -> list[str]:
    """Floating-point operations."""
    if work is None:
        return [line("training", UNKNOWN)]
    rows = [
        line(f"forward: {part}", flop(number)) for part, number in work["forward_by_part"].items()
    ]
    rows += [
        line("forward", flop(work["forward"])),
        line("training", flop(work["train"]), "forward and backward, no more than needed"),
    ]
    if work["update_curvature"]:
        rows.append(
            line(
                "curvature",
                flop(work["update_curvature"]),
                "the optimizer's, spread over its steps",
            )
        )
    if work["optimizer"]:
        rows.append(
            line("optimizer", flop(work["optimizer"]), "its matrix products, a step's share")
        )
    conventional = line("3 x forward", flop(work["conventional"]), "as papers count")
    return [
        *rows,
        conventional,
        line("6 N", flop(work["six_n"]), "as scaling laws count, N without the embedding table"),
    ]


def run_lines(run: Mapping[str, Any], taken: Mapping[str, Any] | None) -> list[str]:
    """Length and time."""
    from lswt_core.reporting.units import format_duration

    length = (
        f"{run['steps']:,} steps of {run['tokens_per_step']:,} tokens = {run['tokens']:,} tokens"
    )
    if taken is None:
        return [f"  {length}", f"  estimated: {UNKNOWN}"]
    share = (
        f", {taken['assumed_efficiency']:.0%} of it assumed"
        if taken["assumed_efficiency"] < 1
        else ""
    )
    basis = (
        f"{taken['source']}; {flop(taken['flops_per_second'])}/s{share},"
        f" {unit(taken['bytes_per_second'])}B/s"
    )
    processes = f" and {run['ranks']} processes" if run["ranks"] > 1 else ""
    estimate = (
        f"estimated: {taken['tokens_per_second']:,.0f} tokens/s,"
        f" {format_duration(taken['seconds'])} on {taken['machine']}{processes}"
    )
    return [f"  {length}", f"  {estimate}", f"  from {basis}", *communication_lines(run, taken)]


def comparison(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """What swaps change, beside the recipe as it is."""
    from lswt_core.reporting.tables import Table
    from lswt_core.reporting.units import format_bytes

    base = next(iter(plans.values()))
    columns: dict[str, tuple[Callable[[Any], float | None], Callable[[float], str]]] = {
        "parameters": (lambda plan: plan["parameters"]["total"], lambda n: f"{n:,}"),
        "training/token": (
            lambda plan: (
                plan["flops"] and plan["flops"]["train"] + plan["flops"]["update_curvature"]
            ),
            flop,
        ),
        "memory": (lambda plan: plan["memory"]["total"], format_bytes),
        "tokens/s (est.)": (
            lambda plan: plan["time"] and plan["time"]["tokens_per_second"],
            lambda n: f"{n:,.0f}",
        ),
    }
    rows = [["", *(word for name in columns for word in (name, ""))]]
    for name, found in plans.items():
        rows.append([name])
        for value, show in columns.values():
            own, before = value(found), value(base)
            change = (
                "" if found is base or own is None or before is None else f"{own / before - 1:+.1%}"
            )
            rows[-1] += [UNKNOWN if own is None else show(own), change]
    return Table(rows[0], rows[1:]).text()


def flop(number: float) -> str:
    """A number of floating-point operations."""
    return f"{unit(number)}FLOP"


def unit(number: float) -> str:
    """A number with a metric prefix."""
    power = 0
    while number >= 1000 and power < len(PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {PREFIXES[power]}"
