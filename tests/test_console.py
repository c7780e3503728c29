"""What people see of slow work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from lswt_core.reporting.console import Console


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        """It is."""
        return True


def test_a_terminal_has_a_bar_of_the_text_that_is_read_and_then_one_of_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    console = Console()
    console.reading("tokenising training text", 0, 0, None)
    for done in (2_000_000, 5_000_000):
        console.reading("tokenising training text", done // 100_000, done, 10_000_000)
    assert console.bar is not None and (console.bar.n, console.bar.total) == (5_000_000, 10_000_000)
    values = {
        "loss": 1.0,
        "perplexity": 2.7,
        "accuracy": 0.5,
        "lr": 1e-3,
        "tokens": 64,
        "tokens_per_second": 10.0,
    }
    console.step(1, 4, values)
    assert console.bar is not None
    assert (console.bar.n, console.bar.total, console.bar.unit) == (
        1,
        4,
        "step",
    )
    console.close()
    assert "tokenising training text:   0%" in screen.getvalue()
    assert "10.0M" in screen.getvalue()
    assert "50 documents" in screen.getvalue()


def test_elsewhere_a_line_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for done in range(1, 50):
        console.reading("tokenising training text", done, done * 1_000_000, 2_000_000_000)
    assert (
        capsys.readouterr().out
        == "tokenising training text: 1 documents, 1.0 MB of about 2.00 GB\n"
    )
