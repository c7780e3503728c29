"""A benchmark for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_bytes

KINDS = ("training", "evaluation", "decoding")


def text(found: Mapping[str, Any]) -> str:
    """The whole report."""
    work, machine = found["work"], found["machine"]
    head = [
        (
            f"{found['recipe']} on {machine['device']}, {machine['threads']} threads,"
            f" {machine['precision']}, attention {machine['attention']}, torch {machine['torch']}"
        ),
        (
            f"a step: {work['rows']} rows x {work['seq_len']} new tokens, {work['remembered']}"
            " remembered, and an update; decoding: one row, after"
            f" {work['remembered'] or work['seq_len']} tokens"
        ),
    ]
    sections = [
        head,
        *(speeds(found["subjects"], kind) for kind in KINDS),
        costs(found["subjects"]),
        pieces(found),
        notes(found["subjects"]),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def speeds(subjects: Mapping[str, Any], kind: str) -> list[str]:
    """Tokens per second, and how the others compare."""
    rows = [[kind, "tokens/s", "ms", "lowest-highest", "times as long as", ""]]
    for name, row in subjects.items():
        if row[kind] is None:
            continue
        seconds, longer = row[kind]["seconds"], row[kind]["times_as_long"]
        span = f"{1e3 * seconds['lowest']:,.1f}-{1e3 * seconds['highest']:,.1f}"
        baseline = (
            ""
            if longer is None
            else f"{longer['median']:.2f} ({longer['lowest']:.2f}-{longer['highest']:.2f})"
        )
        rows.append(
            [
                name,
                f"{row[kind]['tokens_per_second']:,.1f}",
                f"{1e3 * seconds['median']:,.1f}",
                span,
                baseline,
                row["beside"] if baseline else "",
            ]
        )
    return table(rows) if len(rows) > 1 else []


def costs(subjects: Mapping[str, Any]) -> list[str]:
    """Memory, waits, compilation, and the loss that must not be bought with speed."""
    rows = [
        [
            "costs",
            "parameters",
            "held",
            "a step's peak",
            "host waits",
            "first step",
            "graphs",
            "breaks",
            "loss",
        ]
    ]
    for name, row in subjects.items():
        rows.append(
            [
                name,
                f"{row['parameters']:,}",
                format_bytes(row["held_bytes"]),
                format_bytes(row["step_peak_bytes"]),
                "-" if row["waits_per_step"] is None else str(row["waits_per_step"]),
                f"{row['first_step_seconds']:.1f} s",
                f"{row['compiled_graphs']}"
                + (f" + {row['recompiled_later']} later" if row["recompiled_later"] else ""),
                str(row["graph_breaks"]),
                f"{row['loss']:.3f} at step {row['steps']}",
            ]
        )
    return table(rows)


def pieces(found: Mapping[str, Any]) -> list[str]:
    """Ceilings of the machine, and what of them is reached."""
    ceilings, used = found["ceilings"], found["utilisation"]
    rows = [["a step's pieces", "times", "ms each", "of its ceiling"]]
    for piece in found["pieces"]:
        share = "" if piece["of_ceiling"] is None else f"{piece['of_ceiling']:.0%}"
        rows.append([piece["name"], str(piece["times"]), f"{1e3 * piece['seconds']:,.1f}", share])
    reached = (
        f"of the block's ceiling a step reaches {used['necessary']:.0%} (FLOPs that are needed), "
        f"{used['conventional']:.0%} (3 x forward), {used['six_n']:.0%} (6 N)"
        if used
        else "what of the block's ceiling a step reaches is unknown: its FLOPs are (see: plan)"
    )
    return [
        (
            f"ceilings: {ceilings['block_flops_per_second'] / 1e9:,.0f} GFLOP/s a block's matrix"
            f" products, {ceilings['head_flops_per_second'] / 1e9:,.0f} the vocabulary's,"
            f" {ceilings['copy_bytes_per_second'] / 1e9:,.1f} GB/s copies"
        ),
        reached,
        *data_sheet(found["data_sheet"]),
        "",
        *table(rows),
    ]


def data_sheet(found: Mapping[str, Any] | None) -> list[str]:
    """Model FLOPs utilisation, where the accelerator is known."""
    if found is None or "necessary" not in found:
        return []
    return [
        (
            f"of the {found['flops_per_second'] / 1e12:,.0f} TFLOP/s of its data sheet"
            f" ({found['source']}): {found['necessary']:.0%} (FLOPs that are needed),"
            f" {found['conventional']:.0%} (MFU by 3 x forward), {found['six_n']:.0%} (MFU by 6 N)"
        ),
    ]


def notes(subjects: Mapping[str, Any]) -> list[str]:
    """What is worth knowing about peers."""
    return [f"{name}: {row['note']}" for name, row in subjects.items() if row["note"]]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first row is its header."""
    return Table(rows[0], rows[1:]).text(indent="  ").splitlines()
