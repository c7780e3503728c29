"""What a run prints: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

PATIENCE = 3.0  # seconds without a sign of life


class Console:
    """Prints for the first process of a run; the others stay silent."""

    def __init__(self, *, log_every: int = 10, silent: bool = False) -> None:
        self.log_every, self.silent = log_every, silent
        self.live = sys.stderr.isatty() and not silent
        self.bar: tqdm | None = None
        self.told = -PATIENCE  # when `working` last said something

    def say(self, text: str = "") -> None:
        """A line of its own, above the bar."""
        if not self.silent:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line that must not be missed."""
        self.say(f"warning: {text}")

    def working(self, text: str) -> None:
        """Something slow goes on: at most a line every few seconds."""
        if time.monotonic() - self.told > PATIENCE:
            self.told = time.monotonic()
            self.say(text)

    def reading(self, what: str, documents: int, size: int, total: int | None) -> None:
        """Progress in preparing text: documents and bytes done, and bytes in all where that is
        known.
        """
        if self.live and documents:
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
            self.bar.update(size - self.bar.n)
            return
        of_all = f" of about {gigabytes(total)}" if total else ""
        self.working(
            f"{what}: {documents:,} documents, {gigabytes(size)}{of_all}" if documents else what
        )

    def banner(self, lines: Sequence[str]) -> None:
        """A few lines in a frame."""
        width = max(map(len, lines))
        self.say("+" + "-" * (width + 2) + "+")
        for line in lines:
            self.say(f"| {line:<{width}} |")
        self.say("+" + "-" * (width + 2) + "+")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Columns: the first to the left, numbers to the right."""
        cells = [list(header), *([shown(value) for value in row] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
        for row in cells:
            columns = [
                f"{text:<{w}}" if i == 0 else f"{text:>{w}}"
                for i, (text, w) in enumerate(zip(row, widths, strict=True))
            ]
            self.say("  " + "  ".join(columns).rstrip())

    def step(self, step: int, steps: int, values: Mapping[str, float]) -> None:
        """Progress after an update."""
        eta = values["tokens"] / step * (steps - step) / values["tokens_per_second"]
        line = (
            f"loss {values['loss']:.4f}  ppl {values['perplexity']:,.1f}  acc"
            f" {values['accuracy']:.3f}  lr {values['lr']:.2e}  {values['tokens_per_second']:,.0f}"
            " tok/s"
        )
        if self.live:
            if self.bar is None or self.bar.unit != "step":
                self.close()
            self.bar = self.bar or tqdm(
                total=steps, initial=step - 1, unit="step", dynamic_ncols=True, leave=False
            )
            self.bar.set_postfix_str(line)
            self.bar.update(step - self.bar.n)
        elif step % self.log_every == 0 or step in (1, steps):
            self.say(f"step {step:>{len(str(steps))},}/{steps:,}  {line}  eta {duration(eta)}")

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """The result on the held-out text."""
        self.say(
            f"step {step:,}  held-out: loss {values['eval/loss']:.4f}  perplexity"
            f" {values['eval/perplexity']:,.2f} (unigram {values['eval/unigram_perplexity']:,.1f}) "
            f" accuracy {values['eval/accuracy']:.3f}  {values['eval/bits_per_byte']:.3f} bits/byte"
            f"  over {values['eval/tokens']:,.0f} tokens"
        )

    def saved(self, path: Path) -> None:
        """A checkpoint is on disk."""
        size = sum(file.stat().st_size for file in path.iterdir())
        self.say(f"saved {path} ({gigabytes(size)})")

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def shown(value: object) -> str:
    """A cell of a table."""
    match value:
        case bool() | None:
            return "-" if value is None else str(value).lower()
        case int():
            return f"{value:,}"
        case float():
            return f"{value:g}"
    return str(value)


def duration(seconds: float) -> str:
    """Seconds for people: 42s, 3m10s, 5h02m, 12 days, 3.4 years."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 2 * 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    days = seconds / 86400
    return f"{days:,.0f} days" if days < 730 else f"{days / 365.25:,.1f} years"


def gigabytes(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.2f} GB"
