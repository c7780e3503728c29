"""Format a benchmark's results as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_bytes

KINDS = ("training", "evaluation", "decoding")


def format_report(results: Mapping[str, Any]) -> str:
    """Return the whole report."""
    contenders = results["contenders"]
    sections = [
        setup_lines(results),
        *(throughput_table(contenders, kind) for kind in KINDS),
        cost_table(contenders),
        breakdown_lines(results),
        [f"{name}: {row['note']}" for name, row in contenders.items() if row["note"]],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def setup_lines(results: Mapping[str, Any]) -> list[str]:
    """Return recipe, machine and sizes."""
    work, machine = results["work"], results["machine"]
    prompt = work["memory_length"] or work["seq_len"]
    return [
        f"{results['recipe']} on {machine['device']}, {machine['threads']} threads,"
        f" {machine['precision']}, attention {machine['attention']}, torch {machine['torch']}",
        f"a training step: {work['batch_size']} sequences x {work['seq_len']} new tokens, memory of"
        f" {work['memory_length']}, and an update; decoding: one sequence, after {prompt} tokens",
    ]


def throughput_table(contenders: Mapping[str, Any], kind: str) -> list[str]:
    """Return tokens per second, and time relative to the baseline; [] if nobody did the work."""
    header, rows = (kind, "tokens/s", "ms", "min-max", "times as long as", "baseline"), []
    for name, row in contenders.items():
        if row[kind] is None:
            continue
        seconds, relative = row[kind]["seconds"], row[kind]["times_as_long"]
        comparison = ["", ""]
        if relative is not None:
            spread = f"({relative['min']:.2f}-{relative['max']:.2f})"
            comparison = [f"{relative['median']:.2f} {spread}", row["baseline"]]
        rows.append(
            [
                name,
                f"{row[kind]['tokens_per_second']:,.1f}",
                f"{1e3 * seconds['median']:,.1f}",
                f"{1e3 * seconds['min']:,.1f}-{1e3 * seconds['max']:,.1f}",
                *comparison,
            ]
        )
    return table_lines(header, rows) if rows else []


def cost_table(contenders: Mapping[str, Any]) -> list[str]:
    """Return memory, synchronisations, compilation and loss."""
    columns = "costs,parameters,kept,a step's peak,host syncs,first step,graphs,breaks,loss"
    rows = []
    for name, row in contenders.items():
        graphs = str(row["compiled_graphs"])
        if row["recompiled_later"]:
            graphs += f" + {row['recompiled_later']} later"
        rows.append(
            [
                name,
                f"{row['parameters']:,}",
                format_bytes(row["held_bytes"]),
                format_bytes(row["step_peak_bytes"]),
                "-" if row["syncs_per_step"] is None else str(row["syncs_per_step"]),
                f"{row['first_step_seconds']:.1f} s",
                graphs,
                str(row["graph_breaks"]),
                f"{row['loss']:.3f} at step {row['steps']}",
            ]
        )
    return table_lines(columns.split(","), rows)


def breakdown_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the machine's ceilings, the utilisation of them, and the breakdown of a step."""
    ceilings, used = results["ceilings"], results["utilisation"]
    reached = "utilisation of the block's ceiling: unknown, because FLOPs are unknown (see: plan)"
    if used:
        reached = (
            f"utilisation of the block's ceiling: {used['necessary']:.0%} (necessary FLOPs),"
            f" {used['conventional']:.0%} (3 x forward), {used['six_n']:.0%} (6 N)"
        )
    header, rows = ("a step's breakdown", "times", "ms each", "of its ceiling"), []
    for part in results["breakdown"]:
        share = "" if part["of_ceiling"] is None else f"{part['of_ceiling']:.0%}"
        rows.append([part["name"], str(part["times"]), f"{1e3 * part['seconds']:,.1f}", share])
    return [
        f"ceilings: {ceilings['block_flops_per_second'] / 1e9:,.0f} GFLOP/s matrix products of a"
        f" block, {ceilings['head_flops_per_second'] / 1e9:,.0f} of the LM head,"
        f" {ceilings['copy_bytes_per_second'] / 1e9:,.1f} GB/s copies",
        reached,
        *data_sheet_lines(results["data_sheet"]),
        "",
        *table_lines(header, rows),
    ]


def data_sheet_lines(used: Mapping[str, Any] | None) -> list[str]:
    """Return the model FLOPs utilisation; [] if the accelerator or the FLOPs are unknown."""
    if used is None or "necessary" not in used:
        return []
    return [
        f"utilisation of the {used['flops_per_second'] / 1e12:,.0f} TFLOP/s of its data sheet"
        f" ({used['source']}): {used['necessary']:.0%} (necessary FLOPs),"
        f" {used['conventional']:.0%} (MFU by 3 x forward), {used['six_n']:.0%} (MFU by 6 N)"
    ]


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the indented lines of a table."""
    return Table(header, rows).text(indent="  ").splitlines()
