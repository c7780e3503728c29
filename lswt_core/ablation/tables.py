"""A report in words: its verdict, its tables as text, and report.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lswt_core.reporting.console import duration, gigabytes

Report = dict[str, Any]
PICTURE = "report.png"


def summary(report: Report) -> list[str]:
    """What was found, what was not, and on what ground, a sentence each."""
    settings, comparisons = report["settings"], report["comparisons"]
    seeds, margin = len(settings["seeds"]), settings["margin"]
    ground = (
        f"{seeds} seed{'s' if seeds != 1 else ''} of {settings['steps']:,} steps"
        f" ({settings['tokens']:,} tokens) each"
    )
    sentences = [finding(one) for one in comparisons]
    unresolved = [one for one in comparisons if one["verdict"] == "not resolved"]
    if unresolved:
        sentences.append(
            f"Not resolved with {ground}: {', '.join(one['arm'] for one in unresolved)}. That is no"
            " evidence of equality."
        )
    else:
        sentences.append(f"Based on {ground}.")
    broken = [one["arm"] for one in report["certificate"] if one["status"] == "broken"]
    if broken:
        sentences.append(
            f"NOT A CLEAN SWAP: {', '.join(broken)} (see the certificate); nothing may be ascribed"
            " to these swaps."
        )
    sentences += [f"{note}." for note in settings.get("notes", ())]
    sentences.append(
        "It holds for this recipe, size and length of training, with hyper-parameters as they are;"
        f" margin {margin:g} nats."
    )
    return sentences


def finding(one: dict[str, Any]) -> str:
    """A comparison as a sentence."""
    if one["delta"] is None:
        return f"{one['arm']}: {one['verdict']}; {one['why']}."
    interval = (
        "no interval"
        if one["ci95"] is None
        else f"95 % interval {signed(one['ci95'][0])} to {signed(one['ci95'][1])}"
    )
    return (
        f"{one['arm']}: {one['verdict']}, {signed(one['delta'])} nats per token ({interval});"
        f" {one['why']}."
    )


def signed(value: float | None) -> str:
    """A difference in nats: four decimals, or as many as show it."""
    if value is None:
        return "-"
    return f"{value:+.4f}" if value == 0 or abs(value) >= 0.00005 else f"{value:+.1e}"


def chance(p: float | None) -> str:
    """A p value."""
    if p is None:
        return "-"
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


LOSSES = [
    "arm",
    "held-out loss (mean ± sd)",
    "difference",
    "95 % interval",
    "p",
    "p (Holm)",
    "verdict",
    "seeds",
    "failed",
    "seeds needed",
]
COSTS = [
    *("arm", "parameters", "", "FLOP per token", "", "training tokens", "", "training FLOP", ""),
    *("evaluated tokens", "", "memory", "", "tokens/s", ""),
]


def loss_rows(report: Report) -> list[list[str]]:
    """The table of losses and differences."""
    compared = {one["arm"]: one for one in report["comparisons"]}
    return [loss_row(arm, compared.get(arm["name"])) for arm in report["arms"]]


def loss_row(arm: dict[str, Any], one: dict[str, Any] | None) -> list[str]:
    """An arm's loss, and its comparison if it is not the baseline."""
    values = arm["final_loss"]["values"]
    failed = f"{len(arm['failures'])} of {len(values)}"
    if one is None:
        finished = sum(value is not None for value in values)
        return [arm["name"], mean_loss(arm), "", "", "", "", "baseline", str(finished), failed, ""]
    interval, needed = one["ci95"], one["seeds_needed"]
    shown = [
        missing(one, "delta") if one["delta"] is None else signed(one["delta"]),
        (
            missing(one, "ci95")
            if interval is None
            else f"{signed(interval[0])} .. {signed(interval[1])}"
        ),
        missing(one, "p") if one["p"] is None else chance(one["p"]),
        missing(one, "p_holm") if one["p_holm"] is None else chance(one["p_holm"]),
        one["verdict"],
        str(one["seeds"]),
        failed,
        missing(one, "seeds_needed") if needed is None else f"{needed:,}",
    ]
    return [arm["name"], mean_loss(arm), *shown]


def mean_loss(arm: dict[str, Any]) -> str:
    """An arm's mean loss and its spread over seeds."""
    mean, std = arm["final_loss"]["mean"], arm["final_loss"]["std"]
    shown = missing(arm, "mean") if mean is None else f"{mean:.4f}"
    if std is None:
        return f"{shown} ± unknown" if "std" in arm["unknown"] else shown
    return f"{shown} ± {std:.4f}"


# of every arm: where it is not there, it could not be measured
WORK = {"flops_per_token", "training_flops"}


def missing(entry: dict[str, Any], key: str) -> str:
    """What stands for a number that is not there: it does not apply, or it could not be computed."""
    return "unknown" if key in {*entry["unknown"], *WORK} or "delta" in entry["unknown"] else "-"


def unknown_lines(report: Report) -> list[str]:
    """Every number that could not be computed, and why."""
    arms = [(arm["name"], arm["unknown"]) for arm in report["arms"]]
    compared = [(one["arm"], one["unknown"]) for one in report["comparisons"]]
    return [
        f"{name}: {key} is unknown: {why}"
        for name, unknown in (*arms, *compared)
        for key, why in unknown.items()
    ]


def cost_rows(report: Report) -> list[list[str]]:
    """The table of costs, each with its difference to the baseline's: how unequal the arms are."""
    base = report["arms"][0]
    return [[arm["name"], *cost_cells(arm, base)] for arm in report["arms"]]


def cost_cells(arm: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """What an arm costs, and by how much that differs from the baseline."""
    shows: list[tuple[str, Callable[[Any], str]]] = [
        ("parameters", lambda n: f"{n:,}"),
        ("flops_per_token", lambda n: f"{n:,}"),
        ("tokens", lambda n: f"{n:,}"),
        ("training_flops", lambda n: f"{n:.3e}"),
        ("evaluated_tokens", lambda n: f"{n:,}"),
        ("peak_bytes", gigabytes),
        ("tokens_per_second", lambda n: f"{n:,.0f}"),
    ]
    own, other = ({**one, "evaluated_tokens": one["evaluated"]["tokens"]} for one in (arm, base))
    cells = []
    for key, show in shows:
        known = own[key] is not None
        share = (
            f"{own[key] / other[key] - 1:+.1%}" if known and other[key] and arm is not base else ""
        )
        cells += [show(own[key]) if known else missing(arm, key), share]
    return cells


def seed_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Every run's loss."""
    seeds = [str(seed) for seed in report["settings"]["seeds"]]
    rows = [
        [a["name"], *("failed" if v is None else f"{v:.4f}" for v in a["final_loss"]["values"])]
        for a in report["arms"]
    ]
    return ["arm", *(f"seed {seed}" for seed in seeds)], rows


def probe_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Isotropy, attention and whatever else was looked at, where it applies."""
    names = list(dict.fromkeys(name for arm in report["arms"] for name in arm["probes"]))
    rows = [[arm["name"], *(probe(arm, name) for name in names)] for arm in report["arms"]]
    return ["arm", *(name.replace("_", " ") for name in names)], rows if names else []


def probe(arm: dict[str, Any], name: str) -> str:
    """What an arm's probe showed."""
    return f"{arm['probes'][name]:.4f}" if name in arm["probes"] else missing(arm, name)


def change_rows(report: Report) -> list[list[str]]:
    """What every arm changes, and where it is written."""
    return [
        [arm["name"], c["key"], show(c["before"]), show(c["after"]), c["where"]]
        for arm in report["arms"]
        for c in arm["changes"]
    ]


def show(value: Any) -> str:
    """A recipe's value, or that there is none."""
    return "-" if value is None else str(value)


def certificate_rows(report: Report) -> list[list[str]]:
    """Every arm's certificate in a row."""
    return [certificate_row(one) for one in report["certificate"]]


def certificate_row(one: dict[str, Any]) -> list[str]:
    """An arm's certificate; what its runs had in common with the baseline's is told once where it
    is the same for all seeds.
    """
    first_visible = {f"{run['bitwise_equal']} of {run['shared_parameters']}" for run in one["runs"]}
    batches = {f"{run['batches_equal']:,} of {run['batches']:,}" for run in one["runs"]}
    knob = one["matched"]
    matched = "" if knob is None else f"{knob['key']} = {knob['size']} ({knob['residual']:+.3%})"
    common = [", ".join(sorted(first_visible)), ", ".join(sorted(batches))]
    return [
        one["arm"],
        one["status"],
        ", ".join(one["axes"]),
        *common,
        matched,
        "; ".join(flaw["text"] for flaw in one["flaws"]),
    ]


CERTIFICATE = [
    "arm",
    "certificate",
    "differs in",
    "shared parameters that start equal",
    "equal batches",
    "matched by",
    "other differences",
]
CHANGES = ["arm", "key", "baseline", "arm's", "written in"]


def power_lines(report: Report) -> list[str]:
    """What the seeds could have resolved, and how many more would."""
    lines = []
    for one in report["comparisons"]:
        if one["std"] is None:
            continue
        margin, needed = one["margin"], one["margin_seeds"]
        count = "an unknown number of" if "margin_seeds" in one["unknown"] else needed
        would = f"{count} seeds would find a difference of {margin:g} nats with a chance of 80 %"
        plan = would if count else "no number of seeds is in sight"
        shared = (
            ""
            if one["correlation"] is None
            else f"; the arms share noise with correlation {one['correlation']:.2f}"
        )
        lines.append(
            f"{one['arm']}: differences between seeds vary by {one['std']:.2g} nats{shared};"
            f" {plan}."
        )
    return lines


def failure_lines(report: Report) -> list[str]:
    """Every run that failed."""
    return [
        f"{arm['name']}, seed {one['seed']}: {one['why']}"
        for arm in report["arms"]
        for one in arm["failures"]
    ]


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a terminal."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = (
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines)


def terminal(report: Report) -> str:
    """What the command prints at its end."""
    parts = [
        aligned(LOSSES, loss_rows(report)),
        aligned(COSTS, cost_rows(report)),
        "\n".join(summary(report)),
    ]
    parts += ["\n".join(unknown_lines(report)), "\n".join(failure_lines(report))]
    return "\n\n".join(filter(None, parts))


def markdown(report: Report) -> str:
    """report.md."""
    seeds, probes = seed_rows(report), probe_rows(report)
    parts = [
        f"# {report['name']}",
        "\n".join(f"- {sentence}" for sentence in summary(report)),
        f"![differences, curves and loss by position]({PICTURE})",
        grid(LOSSES, loss_rows(report)),
        "## What it costs\n\n" + grid(COSTS, cost_rows(report)),
        "## Every seed\n\n" + grid(*seeds),
        listed("What these seeds could resolve", power_lines(report)),
        listed("What could not be computed", unknown_lines(report)),
        listed("Failures", failure_lines(report)),
        "## Probes\n\n" + grid(*probes) if probes[1] else "",
        "## What the arms change\n\n" + grid(CHANGES, change_rows(report)),
        "## Certificate\n\n" + grid(CERTIFICATE, certificate_rows(report)),
        (
            f"## Made with\n\n```\n{report['command']}\n```\n\nTime spent in training:"
            f" {duration(sum(a['seconds'] for a in report['arms']))}."
        ),
        (
            "## Citations\n\n```bibtex\n" + "\n".join(report["citations"]) + "\n```"
            if report["citations"]
            else ""
        ),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def listed(title: str, lines: Sequence[str]) -> str:
    """A headed list; nothing where there are no lines."""
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        for row in lines
    )
