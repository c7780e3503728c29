"""What cannot be measured on the meta device is reported as unknown once; commands continue."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_plugin_errors import Write, recipe, write  # noqa: F401

from lswt_core.__main__ import main
from lswt_core.benchmark.text_report import format_report

ROUTED = "chosen = (x.flatten(0, -2)[:, 0] > 0).nonzero(); x = x + 0 * len(chosen)"
COUNTING = """
from lswt_core.interfaces import Optimizer
class Looking(Optimizer, torch.optim.SGD):
    '''Looks at a number.'''
    name = "looking"
    def __init__(self, groups, *, lr: float = 0.1) -> None:
        super().__init__(groups, lr=lr, momentum=0.9)
    def step(self, closure=None):
        float(self.param_groups[0]["params"][0].sum())
        return super().step(closure)
"""


def planned(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    """The plan of a command, as data."""
    assert main(["plan", *map(str, words), "--on", "h100", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_reports_flops_that_depend_on_data_as_unknown(
    write: Write,  # noqa: F811
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [recipe, "--plugin", write(body=ROUTED), "--swap", "ffn=own"]
    report = planned(capsys, *words)
    swapped = report["swaps"]["ffn=own"]
    assert report["flops"]["train"] > 0 and not report["unknown"]
    assert swapped["flops"] is None
    assert swapped["time"] is None
    assert swapped["parameters"]["total"] > 0
    assert "activations" not in swapped["memory"] and swapped["memory"]["optimizer"] > 0
    (why,) = swapped["unknown"].values()
    assert (
        "ffn/own" in why
        and "OwnLinear.forward" in why
        and "nonzero" in why
        and "scatter_add" in why
    )
    assert main(["plan", *map(str, words), "--on", "h100", "ffn.use=own"]) == 0
    output = capsys.readouterr().out
    plan = output.partition("\n\nnext:")[0]
    assert "unknown" in plan.splitlines()[-1] and output.count("OwnLinear.forward") == 1


def test_the_state_of_an_optimizer_that_reads_values_is_unknown(
    write: Write,  # noqa: F811
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(before=COUNTING)
    file.write_text(file.read_text().replace("return [OwnLinear]", "return [OwnLinear, Looking]"))
    report = planned(capsys, recipe, "--plugin", file, "optimizer.use=looking")
    (why,) = report["unknown"].values()
    assert "optimizer/looking" in why
    assert report["flops"]["train"] > 0
    assert "optimizer" not in report["memory"]


@pytest.mark.slow
def test_an_ablation_continues_but_cannot_match_unknown_flops(
    write: Write,  # noqa: F811
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "ablate",
        str(recipe),
        "--plugin",
        str(write(body=ROUTED)),
        "--swap",
        "ffn=own",
        "--dry-run",
    ]
    assert main(words) == 0
    output = capsys.readouterr().out
    row = next(line.split() for line in output.splitlines() if line.startswith("ffn=own"))
    assert row[3] == "unknown" and output.count("OwnLinear.forward") == 1
    assert main([*words, "--match", "flops"]) == 2


def test_a_run_continues(
    write: Write,  # noqa: F811
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("matplotlib", "matplotlib.figure"):  # no pictures
        monkeypatch.setitem(sys.modules, name, None)
    words = [
        "run",
        str(recipe),
        "--plugin",
        str(write(body=ROUTED)),
        "ffn.use=own",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert output.count("OwnLinear.forward") == 1 and "at least" in output


def test_a_benchmark_measures_without_them(
    write: Write,  # noqa: F811
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--plugin", str(write(body=ROUTED)), "ffn.use=own", "--rounds=1", "--tokens=1"]
    assert main(["bench", str(recipe), *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["utilisation"] == {} and report["breakdown"]
    assert "FLOPs are unknown" in format_report(report)


LINEAR = """
from lswt_core.interfaces import AttentionBackend
from lswt_core.plugin_api.attention import reference_attention
class Near(AttentionBackend):
    '''The same by another way.'''
    name = "near"
    def forward(self, parts):
        return reference_attention(parts)
class Other(AttentionBackend):
    '''Something else than attention.'''
    name = "other"
    def forward(self, parts):
        q = parts[0].q
        return q + (q @ q.mT @ q) * 1e-3
"""


def test_a_backend_without_softmax_is_run_and_counted(
    write: Write,  # noqa: F811
    recipe: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(before=LINEAR)
    file.write_text(
        file.read_text().replace("return [OwnLinear]", "return [OwnLinear, Near, Other]")
    )
    words = [
        recipe,
        "--plugin",
        file,
        "attention.use=eager",
        "--swap",
        "attention=near",
        "--swap",
        "attention=other",
    ]
    report = planned(capsys, *words)
    plain, near, other = (
        report["flops"],
        *(report["swaps"][f"attention={name}"]["flops"] for name in ("near", "other")),
    )
    assert near == plain
    heads, width, new, layers = 2, 16, 16, 2
    # q [T, H, D] times its transpose, and that times q
    products = 2 * layers * new * 2 * heads * heads * width
    assert other["forward_by_part"]["attention scores"] == products // new
    assert (
        other["forward_by_part"]["attention projections"]
        == plain["forward_by_part"]["attention projections"]
    )
    assert other["train"] < plain["train"]
