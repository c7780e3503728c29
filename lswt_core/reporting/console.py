"""Console output of a run: a progress bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_bytes, format_duration

LOG_INTERVAL = 3.0  # seconds between two lines about slow work


class Console:
    """Output of rank 0; other ranks are ``silent``. Steps are logged each ``log_every``."""

    def __init__(self, *, log_every: int = 10, silent: bool = False) -> None:
        self.log_every, self.silent = log_every, silent
        self.live = sys.stderr.isatty() and not silent
        self.bar: tqdm | None = None
        self.last_progress = -LOG_INTERVAL  # when `progress` last printed a line

    def say(self, text: str = "") -> None:
        """Print a line above the progress bar."""
        if not self.silent:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.say(f"warning: {text}")

    def progress(self, text: str) -> None:
        """Print a line about slow work, at most one every LOG_INTERVAL seconds."""
        if time.monotonic() - self.last_progress > LOG_INTERVAL:
            self.last_progress = time.monotonic()
            self.say(text)

    def reading(self, what: str, documents: int, size: int, total: int | None) -> None:
        """Show progress in reading text, in documents and bytes; ``total`` bytes, if known."""
        if not documents:
            self.progress(what)
        elif self.live:
            bar = self.open_bar(what, documents, total)
            bar.update(size - bar.n)
        else:
            of_total = f" of about {format_bytes(total)}" if total else ""
            self.progress(f"{what}: {documents:,} documents, {format_bytes(size)}{of_total}")

    def open_bar(self, what: str, documents: int, total: int | None) -> tqdm:
        """Return the progress bar of reading ``what``, in bytes."""
        if self.bar is None or self.bar.desc != f"{what}: ":
            self.close()
            self.bar = tqdm(
                desc=what,
                total=total,
                unit="B",
                unit_scale=True,
                dynamic_ncols=True,
                leave=False,
            )
        self.bar.set_postfix_str(f"{documents:,} documents")
        return self.bar

    def banner(self, lines: Sequence[str]) -> None:
        """Print lines in a frame."""
        width = max(map(len, lines))
        self.say("+" + "-" * (width + 2) + "+")
        for line in lines:
            self.say(f"| {line:<{width}} |")
        self.say("+" + "-" * (width + 2) + "+")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table; the first column is text, the others are numbers."""
        cells = [[format_cell(value) for value in row] for row in rows]
        self.say(Table(header, cells).text(indent="  "))

    def step(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Show the metrics of a training step, and the time that is left."""
        losses = "no scored token"
        if "loss" in values:
            losses = (
                f"loss {values['loss']:.4f}  ppl {values['perplexity']:,.1f}"
                f"  acc {values['accuracy']:.3f}"
            )
        line = f"{losses}  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f} tok/s"
        if self.live:
            self.move_step_bar(step, steps, line)
        elif step % self.log_every == 0 or step in (1, steps):
            tokens_left = values["tokens"] / step * (steps - step)
            eta = format_duration(tokens_left / values["tokens_per_second"])
            self.say(f"step {step:>{len(str(steps))},}/{steps:,}  {line}  eta {eta}")

    def move_step_bar(self, step: int, steps: int, line: str) -> None:
        """Move the progress bar of training to ``step``."""
        if self.bar is None or self.bar.unit != "step":
            self.close()
            self.bar = tqdm(
                total=steps, initial=step - 1, unit="step", dynamic_ncols=True, leave=False
            )
        self.bar.set_postfix_str(line)
        self.bar.update(step - self.bar.n)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Print the metrics of an evaluation on the held-out text."""
        unigram = values["eval/unigram_perplexity"]
        beside = "" if math.isnan(unigram) else f" (unigram {unigram:,.1f})"  # NaN: a stream
        self.say(
            f"step {step:,}  held-out: loss {values['eval/loss']:.4f}"
            f"  perplexity {values['eval/perplexity']:,.2f}{beside}"
            f"  accuracy {values['eval/accuracy']:.3f}"
            f"  {values['eval/bits_per_byte']:.3f} bits/byte"
            f"  over {values['eval/tokens']:,.0f} tokens"
        )

    def saved(self, path: Path) -> None:
        """Print where a checkpoint was written, and its size."""
        size = sum(file.stat().st_size for file in path.iterdir())
        self.say(f"saved {path} ({format_bytes(size)})")

    def close(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def format_cell(value: object) -> str:
    """Return a value as the cell of a table."""
    match value:
        case None:
            return "-"
        case bool():
            return str(value).lower()
        case int():
            return f"{value:,}"
        case float():
            return f"{value:g}"
    return str(value)
