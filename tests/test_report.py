"""The page and the picture of a run, from whole and from broken run directories."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lswt_core.errors import DataError
from lswt_core.reporting.curves import ReportUnavailable, write_curves
from lswt_core.reporting.metrics_log import read_metrics, smooth
from lswt_core.reporting.run_report import write_report
from lswt_core.reporting.tables import Table
from lswt_core.reporting.units import format_bytes, format_duration

HOSTILE = '</pre><script src="https://evil.example/x.js"></script> & "quoted" ⟦model⟧ <img src=x>'


def training(step: int, **more: float | None) -> dict[str, Any]:
    loss = 3 + 6 / step
    entry = {
        "step": step,
        "tokens": step * 1024,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_second": 1000.0,
        "seconds": step * 1.5,
    }
    return entry | more


def evaluation(step: int, loss: float | None, **more: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "eval/loss": loss,
        "eval/perplexity": loss and math.exp(loss),
        "eval/unigram_perplexity": 500.0,
        **more,
    }


WHOLE = [
    training(step, **{"loss/simctg": 0.1, "optimizer/unclipped_share": 0.4})
    for step in range(1, 101)
] + [evaluation(100, math.log(25))]


def make_run(directory: Path, entries: list[dict[str, Any]] | None) -> Path:
    run = directory / "trial & error"
    run.mkdir()
    if entries is not None:
        (run / "metrics.jsonl").write_text(
            "".join(json.dumps(entry) + "\n" for entry in entries) + '{"step": 101, "lo'
        )
    return run


class Page(HTMLParser):
    """A page as a browser sees it: unclosed tags, addresses that are fetched, the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.addresses, self.tags, self.words = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_tells_all_and_fetches_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, WHOLE)
    (run / "sample.txt").write_text(HOSTILE, encoding="utf-8")
    (run / "recipe.toml").write_text('[data]\nname = "<b>"\n', encoding="utf-8")
    parameters = {"total": 1000, "trainable": 750, "by_component": {"ffn": 750, "embedding": 250}}
    environment = {
        "parameters": parameters,
        "versions": {"torch": "2.x"},
        "notes": ["<one>", {"two": None}],
        "url": "https://x.example",
    }
    (run / "environment.json").write_text(json.dumps(environment))
    write_curves(run)
    page = Page(write_report(run))
    assert page.open == []
    assert len(page.addresses) == 1 and page.addresses[0].startswith("data:image/png;base64,")
    assert "script" not in page.tags and page.tags.count("img") == 1
    assert not re.search(r"@import|url\(", (run / "report.html").read_text(encoding="utf-8"))
    for text in (
        "trial & error",
        (
            "Held-out perplexity 25.00 (loss 3.2189) at step 100, 20.0 times lower than the unigram"
            " baseline (500.0)."
        ),
        "100 steps, 102,400 tokens, 2 min 30 s of training; last training loss 3.0600.",
        HOSTILE,
        'name = "<b>"',
        "ffn 750 75.0%",
        "trainable 750 75.0%",
        "torch 2.x",
        "<one> two",
    ):
        assert text in page.text


@pytest.mark.parametrize(
    ("entries", "verdict"),
    [
        (None, "Nothing was logged yet."),
        ([], "Nothing was logged yet."),
        (
            [training(1)],
            (
                "The model was not evaluated on held-out text. 1 steps, 1,024 tokens, 1.5 s of"
                " training; last training loss 9.0000."
            ),
        ),
        ([training(1, loss=None, grad_norm=None)], "last training loss not finite."),
        ([evaluation(0, 7.0)], "not below the unigram baseline (500.0)."),
        ([evaluation(0, None)], "Nothing was logged yet."),
        (
            [evaluation(1, 2.0), evaluation(2, None)],
            "Held-out perplexity 7.39 (loss 2.0000) at step 1, 67.7 times lower",
        ),
        ([{"step": 3, "eval/loss": 2.0}], "Held-out perplexity 7.39 (loss 2.0000) at step 3."),
    ],
)
def test_whatever_there_is_becomes_a_page(
    tmp_path: Path, entries: list[dict[str, Any]] | None, verdict: str
) -> None:
    run = make_run(tmp_path, entries)
    assert write_curves(run) == (run / "curves.png" if entries else None)
    assert verdict in Page(write_report(run)).text


def test_curves_are_the_same_file_for_the_same_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, WHOLE)
    first = write_curves(run).read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 20_000
    assert write_curves(run).read_bytes() == first


def test_without_matplotlib_the_way_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, WHOLE)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ReportUnavailable, match=r"pip install 'lswt-core\[report\]'"):
        write_curves(run)
    assert "no picture was drawn" in Page(write_report(run)).text


def test_a_torn_last_line_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text("")
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_smoothing_keeps_lines_straight_and_averages_noise() -> None:
    line = [0.5 * i for i in range(200)]
    assert smooth(line)[:196] == pytest.approx(line[:196])  # at the end the window is one-sided
    noise = smooth([(-1.0) ** i for i in range(1000)])
    assert max(map(abs, noise[100:])) < 0.05
    assert smooth([]) == [] and smooth([2.0]) == [2.0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (61, "1 min 01 s"),
        (3599.6, "1 h 00 min"),
        (3.6e6, "42 days"),
        (1.0e8, "3.2 years"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_reports_need_no_torch() -> None:
    code = (
        "import sys, lswt_core.reporting.run_report;"
        " print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "False False\n"
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2e6, "2.0 MB"), (3.2e12, "3,200.00 GB")],
)
def test_sizes_have_decimal_units(size: float, text: str) -> None:
    assert format_bytes(size) == text


def test_a_table_is_written_as_text_markdown_and_html() -> None:
    table = Table(["arm", "loss"], [["a|b <c>", "3.1"], ["d", "12.25"]])
    assert table.text(indent="  ") == "  arm       loss\n  a|b <c>    3.1\n  d        12.25"
    lines = table.markdown().splitlines()
    assert lines[:3] == ["| arm | loss |", "| --- | ---: |", "| a\\|b <c> | 3.1 |"]
    page = table.html()
    assert '<td class="text">a|b &lt;c&gt;</td><td>3.1</td>' in page
    assert page.startswith('<div class="wide"><table>')


def test_pages_are_readable_on_narrow_and_dark_screens(tmp_path: Path) -> None:
    run = make_run(tmp_path, WHOLE)
    write_curves(run)
    text = write_report(run).read_text(encoding="utf-8")
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text
    tables, boxes = text.count("<table><thead>"), text.count('<div class="wide"><table>')
    assert tables == boxes > 0, "every table of numbers scrolls in a box of its own"
    (alt,) = re.findall(r'<img alt="([^"]+)"', text)
    assert "Held-out perplexity 25.00" in alt
