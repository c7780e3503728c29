"""The report of an evaluation: terminal, JSON, Markdown, a page and a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lswt_core.evaluation.attention_sinks import FIRST_TOKEN, REGISTERS
from lswt_core.evaluation.plots import PICTURE, plot_evaluation
from lswt_core.plugin_api.atomic_write import write_atomically
from lswt_core.reporting import sections
from lswt_core.reporting.curves import ReportUnavailable
from lswt_core.reporting.sections import Bullets, Picture, Section, Sentences
from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_count

Report = dict[str, Any]  # see cli/evaluate.py and measure.evaluate_text
NAME = "evaluation"  # of the files, without their suffix
SINKS = {FIRST_TOKEN: "the first token", REGISTERS: "registers (keys of no token)"}


def write_report(report: Report, directory: Path) -> None:
    """Write evaluation.json, .md, .html and .png into a directory; without matplotlib no picture,
    and a warning on standard error.
    """
    document = json.dumps(report, indent=1, allow_nan=False) + "\n"
    write_atomically(directory / f"{NAME}.json", document.encode())
    try:
        picture = plot_evaluation(report)
    except ReportUnavailable as error:
        print(f"warning: {error}", file=sys.stderr)
        picture = None
    pictures = {} if picture is None else {PICTURE: picture}
    for name, content in pictures.items():
        write_atomically(directory / name, content)
    title, parts = report["model"], [*list_sections(report, pictured=bool(pictures))]
    markdown = sections.render_markdown(title, parts)
    write_atomically(directory / f"{NAME}.md", markdown.encode())
    html = sections.render_page(title, parts, pictures)
    write_atomically(directory / f"{NAME}.html", html.encode())


def describe_reading(report: Report) -> str:
    """Return how texts were read, in a sentence."""
    asked, trained, told = report["seq_len"], report["trained_seq_len"], ""
    if asked != trained:
        told = (
            " (losses, memory, key tokens, quantised caches, registers, dependence on segments; the"
            f" other measures in those of training, {trained:,})"
        )
    return f"Read in segments of {asked:,} tokens{told}, computed in {report['precision']}."


def render_text(report: Report) -> str:
    """Return what the command prints."""
    return sections.render_text(list_sections(report))


def list_sections(report: Report, *, pictured: bool = False) -> Iterator[Section]:
    """Yield the whole report; ``pictured``: a picture lies beside it."""
    picture = Picture(PICTURE, describe_picture(report)) if pictured else None
    yield Section("", [Sentences([describe_reading(report)]), picture], printed=True)
    for name, text in report["texts"].items():
        left_out = Bullets(describe_left_out(text["left_out"]))
        yield Section(name, [Sentences([describe_text(name, text)]), left_out], printed=True)
        for one in list_measurements(text):
            yield one._replace(title=f"{name}: {one.title}")
    yield Section("Tasks of the lm-evaluation-harness", [task_table(report["tasks"])], printed=True)


def describe_left_out(left_out: dict[str, str]) -> list[str]:
    """Return what was not possible, and why."""
    return [f"left out: {what.replace('_', ' ')}: {why}" for what, why in left_out.items()]


def task_table(tasks: dict[str, Report]) -> Table:
    """Return the metrics of all tasks."""
    rows = []
    for task, metrics in tasks.items():
        for metric, one in metrics.items():
            error = "" if one["error"] is None else f"{one['error']:.4f}"
            rows.append([task, metric, f"{one['value']:.4f}", error])
    return Table(("task", "metric", "value", "standard error"), rows, text_columns=(0, 1))


def describe_text(name: str, text: Report) -> str:
    """Return losses and size of a text in a sentence."""
    whole, bits = text["whole"], text["bits_per_byte"]
    per_byte = "" if bits is None else f", {bits:.4f} bits per byte"
    return (
        f"{name}: {format_mean(text['loss'])} nats per token, perplexity"
        f" {text['perplexity']:.2f}{per_byte}"
        f" ({format_count(text['tokens'], 'scored token')}; read: {text['tokens_read']:,} of"
        f" {format_count(whole['tokens'], 'token')}, of {text['documents']:,} of"
        f" {format_count(whole['documents'], 'document')})."
    )


def describe_picture(report: Report) -> str:
    """Return the picture's content in words."""
    return (
        "Memory gain by memory length and by position in the segment, loss by context and by"
        " tokens since the document's start. "
        + " ".join(describe_text(name, text) for name, text in report["texts"].items())
    )


def list_measurements(text: Report) -> Iterator[Section]:
    """Yield the tables of a text, those that it has."""
    if text["recall"]:
        yield recall_section(text["recall"], text["recall_chance"])
    if text["memory"]:
        yield memory_section(text["memory"])
        yield memory_position_section(text["memory"][-1]["by_position"])
    if text["effective_context"]:
        yield context_section(text["effective_context"])
    if text["extrapolation"]:
        yield extrapolation_section(text["extrapolation"])
    yield position_section(text["by_position"])
    if text["narrow_memory"]:
        yield narrow_section(text["narrow_memory"])
    yield states_section(text)


def measurement(title: str, table: Table, *notes: str) -> Section:
    """Return the section of a measurement, with remarks on its table."""
    return Section(title, [table, Bullets(notes)], printed=True)


def recall_section(points: list[Report], chance: Report) -> Section:
    """Return the accuracy of answers by distance."""
    rows = [[f"{one['distance']:,}", format_mean(one["accuracy"])] for one in points]
    tokens = sum(one["accuracy"]["tokens"] for one in points)
    return measurement(
        "Recall by distance",
        Table(("segments between fact and question", "accuracy (95 % interval)"), rows),
        f"Share of {format_count(tokens, 'answer')} that are the most likely token.",
        f"Chance: accuracy {chance['accuracy']:.4f}, loss {chance['loss']:.4f} nats, estimated from"
        f" the frequencies of the {format_count(chance['answers'], 'different answer')}. A memory"
        " that is cut for a measurement may do worse: the model was not trained without it.",
    )


def memory_section(points: list[Report]) -> Section:
    """Return the gain of the memory by its length."""
    rows = []
    for point in points:
        length = "as trained" if point["memory"] is None else f"{point['memory']:,}"
        rows.append([length, f"{point['loss']['value']:.4f}", format_mean(point["gain"], "+.4f")])
    tokens = points[-1]["gain"]["tokens"]
    return measurement(
        "Loss with the memory cut",
        Table(("memory (tokens)", "loss", "gain over no memory (95 % interval)"), rows),
        f"Gains are over the {format_count(tokens, 'token')} behind the first segment of their"
        " document.",
    )


def memory_position_section(points: list[Report]) -> Section:
    """Return the gain of the trained memory by position in the segment."""
    rows = [
        [describe_bucket(one["from"]), format_mean(one, "+.4f"), f"{one['tokens']:,}"]
        for one in points
    ]
    header = ("position in the segment", "gain over no memory (95 % interval)", "tokens")
    note = "Of the memory as trained."
    return measurement("Memory gain by position in the segment", Table(header, rows), note)


def context_section(context: Report) -> Section:
    """Return losses by context, and RECL."""
    rows = [
        [f"{one['context']:,}", f"{one['value']:.4f}", format_mean(one["over_longest"], "+.4f")]
        for one in context["losses"]
    ]
    header = ("context (tokens)", "loss", "less that of the longest context (95 % interval)")
    group = {"this model": context["recl"], **context["recl_of_others"]}
    alone = "" if len(group) > 1 else ", in the group of this model alone"
    longest = context["longest_context"]
    lengths = [f"{name}: {describe_recl(recl, longest)}" for name, recl in group.items()]
    return measurement(
        "Loss by context, cold restarts",
        Table(header, rows),
        f"RECL{alone}. {'; '.join(lengths)}.",
        f"The same {format_count(context['targets'], 'token')}, each predicted from exactly so many"
        " tokens.",
        "RECL takes the better of two losses token by token, so that noise lengthens it; the mean"
        " losses show whether a longer context helps on average.",
    )


def describe_recl(recl: Report, longest: int) -> str:
    """Return relative effective context lengths by share r of the hardest targets; one of the
    ``longest`` context is a lower bound.
    """
    shown = []
    for share, length in recl.items():
        least = "at least " if length == longest else ""
        shown.append(f"{least}{length:,} (r = {share})")
    return ", ".join(shown)


def extrapolation_section(measured: Report) -> Section:
    """Return losses by multiples of the trained segment."""
    rows = []
    for point in measured["points"]:
        losses = [format_mean(point[how]) for how in ("streamed", "recomputed")]
        rows.append([f"{point['context']:,}", *losses])
    tokens = measured["points"][0]["streamed"]["tokens"]
    return measurement(
        "Loss by length of the text that is read",
        Table(("window (tokens)", "in segments", "in one pass"), rows),
        f"The same {format_count(tokens, 'token')}, at most {measured['scored']:,} at the end of"
        f" each of {format_count(measured['windows'], 'window')}; the longest document that was"
        f" read has {format_count(measured['longest'], 'token')}.",
    )


def position_section(points: list[Report]) -> Section:
    """Return losses by tokens since the document's start."""
    rows = [
        [describe_bucket(one["from"]), format_mean(one), f"{one['tokens']:,}"] for one in points
    ]
    header = ("tokens since the document's start", "loss (95 % interval)", "tokens")
    return measurement("Loss by position in the document", Table(header, rows))


def narrow_section(errors: list[Report]) -> Section:
    """Return what it costs to keep KV caches in fewer bits."""
    rows = []
    for one in errors:
        increase = format_mean(one["increase"], "+.1e")
        rows.append([one["dtype"], increase, f"{one['largest']:.1e}"])
    header = (
        "train.memory_dtype",
        "loss behind the first segment increases by (95 % interval)",
        "largest change of a token's loss",
    )
    return measurement("KV caches quantised between segments", Table(header, rows))


def states_section(text: Report) -> Section:
    """Return attention sinks, activations, key tokens and repetition."""
    probed = text["probed"]
    rows = [
        [
            "documents x first tokens, from an empty memory",
            f"{probed['documents']} x {probed['tokens']}",
        ]
    ]
    for name, sinks in (text["sinks"] or {}).items():
        rows.append([f"attention to {SINKS[name]}, mean share", f"{sinks['mean']:.4f}"])
        rate = f"sink rate of {SINKS[name]} (layer-heads whose mean share is above 0.3)"
        rows.append([rate, f"{sinks['rate']:.3f}"])
    if text["registers"]:
        gain = format_mean(text["registers"], "+.4f")
        rows.append([f"loss without {SINKS[REGISTERS]} less loss with them (95 % interval)", gain])
    if text["segment_dependence"]:
        change = format_mean(text["segment_dependence"], ".4f")
        what = "change of a token's loss where every segment is read in eight pieces"
        rows.append([f"{what} (95 % interval)", change])
    states = text["activations"]
    rows += [
        ["largest activation", f"{states['largest']:.3g}"],
        ["largest activation / median of its layer", f"{states['largest_over_median']:.3g}"],
        ["massive activations", f"{states['massive']:,}"],
        ["kurtosis of hidden states", f"{states['kurtosis']:.2f}"],
        ["isotropy of final states", f"{states['isotropy']:.4f}"],
    ]
    keys = text["key_tokens"]
    if keys:
        rows.append(["key tokens behind the first segment", f"{keys['share']:.2%}"])
    if keys and keys["perplexity"] is not None:
        perplexity = f"{keys['perplexity']:.2f} ({keys['short_perplexity']:.1f} without memory)"
        rows.append(["LongPPL: perplexity of key tokens", perplexity])
    repetition = text["repetition"]
    for n, share in repetition["repeated"].items() if repetition else ():
        rows.append([f"repeated {n}-grams in greedy continuations", f"{share:.2%}"])
    return measurement("Attention, hidden states and repetition", Table(("measure", "value"), rows))


def describe_bucket(first: int) -> str:
    """Return the positions of a bucket: those from a power of two to the next."""
    return f"{first:,}" if first < 2 else f"{first:,} .. {2 * first - 1:,}"


def format_mean(one: Report, spec: str = ".4f") -> str:
    """Return a mean with its interval."""
    shown = f"{one['value']:{spec}}"
    if one["interval"] is None:
        return shown
    low, high = one["interval"]
    return f"{shown} ({low:{spec}} .. {high:{spec}})"
