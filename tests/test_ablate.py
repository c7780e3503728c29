"""Ablations as a researcher runs them: arms, certificates, matched budgets, runs that fail or are
killed, and what the report says.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from nano import NANO
from processes import Done, environment, run

from lswt_core.__main__ import main
from lswt_core.ablation.arms import ArmSpec, axes_of_swap, lay_out_arms
from lswt_core.ablation.build_arms import AblationSpec
from lswt_core.ablation.certificate import RunRecord, check_records
from lswt_core.ablation.comparison import Comparison
from lswt_core.ablation.match import match_size
from lswt_core.ablation.recipe_diff import Change, diff_recipes, resolve_axes
from lswt_core.ablation.report.compare import make_report
from lswt_core.ablation.report.costs import MEASURED
from lswt_core.ablation.report.limits import list_limits
from lswt_core.ablation.report.page import render_markdown, render_page, render_terminal
from lswt_core.ablation.report.plots import MARKERS
from lswt_core.ablation.report.publish import publish
from lswt_core.ablation.report.verdict import SMALL
from lswt_core.ablation.runs.outcome import ArmResult, Outcome, Study
from lswt_core.ablation.runs.runner import Workers
from lswt_core.ablation.shared_attention import share_attention
from lswt_core.ablation.study import Ablation
from lswt_core.cli.ablate import read_arms
from lswt_core.distributed.world import World
from lswt_core.errors import Incompatible, RecipeError, UsageError
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

RECIPE = (
    NANO
    + """
[memory.xl]
use = "xl-cache"
length = 16
[optimizer]
use = "adamw"
lr = 2e-3
[schedule]
warmup_steps = 2
[tokenizer]
use = "bytes"
[train]
batch_size = 4
seq_len = 16
precision = "float32"
steps = 12
[evaluate]
every = 6
tokens = 1024
batch_size = 2
[checkpoint]
every = 2
[sample]
tokens = 0
"""
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe and a text of several documents."""
    directory = tmp_path_factory.mktemp("ablations")
    words = random.Random(0)
    texts = directory / "texts"
    texts.mkdir()
    for i in range(40):
        texts.joinpath(f"{i}.txt").write_text(
            "".join(words.choice("the cat sat on a mat, ") for _ in range(600))
        )
    directory.joinpath("nano.toml").write_text(RECIPE.format(corpus=texts))
    return directory


def words(place: Path, *more: object) -> list[str]:
    """Two at once: sums, and so where a run is kept, depend on how many threads each has."""
    return ["lswt_core", "ablate", str(place / "nano.toml"), "--jobs", "2", *map(str, more)]


def start(place: Path, *more: object) -> Done:
    return run(*words(place, *more), cwd=place, LSWT_CACHE_DIR=place / "cache")


@pytest.fixture
def dry_run(
    place: Path,
    budgets_once: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Done]:
    """``dry_run(words)``: build and certify the arms in this process."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LSWT_CACHE_DIR", str(place / "cache"))

    def call(*more: str) -> Done:
        command = [*words(place, *more)[1:], "--dry-run"]
        code = main(command)
        return subprocess.CompletedProcess(command, code, *capsys.readouterr())

    return call


def read(directory: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return report


# ---------- a whole ablation


@pytest.fixture(scope="module")
def ablation(place: Path) -> tuple[Path, str]:
    """Three arms, one of which diverges, and two seeds; what was printed."""
    done = start(
        place, "--swap", "ffn=gelu", "--swap", "optimizer.lr=1e30", "--seeds", 2, "--out", "out"
    )
    assert done.returncode == 8, done.stdout + done.stderr
    return place / "out", done.stdout


@pytest.mark.slow
def test_the_report_has_every_number(ablation: tuple[Path, str]) -> None:
    report = read(ablation[0])
    baseline, gelu, _ = report["arms"]
    assert [arm["name"] for arm in report["arms"]] == ["baseline", "ffn=gelu", "optimizer.lr=1e30"]
    assert [arm["swap"] for arm in report["arms"]] == ["", "ffn=gelu", "optimizer.lr=1e30"]
    assert baseline["parameters"] > gelu["parameters"]
    assert baseline["flops_per_token"] > gelu["flops_per_token"]
    assert baseline["tokens_per_second"] > 0 and baseline["peak_bytes"] > 10**7
    values = baseline["final_loss"]["values"]
    assert len(values) == 2
    assert values[0] != values[1]
    assert baseline["final_loss"]["mean"] == pytest.approx(sum(values) / 2)
    assert {"isotropy", "attention_first_token", "attention_registers"} <= baseline["probes"].keys()
    assert 0 < baseline["probes"]["attention_registers"] < 1
    runs = [ablation[0].parent / run["directory"] for run in baseline["runs"]]
    logs = [run.joinpath("metrics.jsonl").read_text() for run in runs]
    logged = [[json.loads(line).get("loss") for line in log.splitlines()] for log in logs]
    means = [fmean(loss for loss in losses if loss is not None) for losses in logged]
    assert baseline["probes"]["mean_training_loss"] == pytest.approx(fmean(means), abs=1e-12)
    assert 0 < baseline["unigram"]["loss"] < math.log(320)
    assert baseline["bits_per_byte"] == pytest.approx(
        baseline["final_loss"]["mean"]
        * baseline["evaluated"]["tokens"]
        / (math.log(2) * baseline["evaluated"]["bytes"])
    )
    one, lost = report["comparisons"]
    assert (one["arm"], one["baseline"], one["seeds"]) == ("ffn=gelu", "baseline", 2)
    assert one["delta"] == pytest.approx(
        gelu["final_loss"]["mean"] - baseline["final_loss"]["mean"]
    )
    assert one["ci95"][0] < one["delta"] < one["ci95"][1] and 0 < one["p"] <= one["p_holm"] <= 1
    assert one["verdict"] in MARKERS
    assert one["documents_ci95"] is not None
    assert lost["verdict"] == "failed" and lost["seeds"] == 0 and lost["delta"] is None


@pytest.mark.slow
def test_a_diverged_arm_is_reported_and_sinks_nothing(ablation: tuple[Path, str]) -> None:
    report = read(ablation[0])
    failures = report["arms"][2]["failures"]
    assert [one["seed"] for one in failures] == [0, 1]
    assert all(one["why"].startswith("diverged") for one in failures)
    assert "FAILED: diverged" in ablation[1]
    assert "optimizer.lr=1e30, seed 1" in (ablation[0] / "report.md").read_text()
    assert "--resume" not in ablation[1], "advice for a run that stands alone"


@pytest.mark.slow
def test_the_loss_is_that_of_the_runs_own_evaluation(
    ablation: tuple[Path, str], place: Path
) -> None:
    value = read(ablation[0])["arms"][0]["final_loss"]["values"][0]
    logged = [
        json.loads(line)
        for path in (place / "runs" / "store").glob("*/metrics.jsonl")
        for line in path.read_text().splitlines()
        if '"eval/loss"' in line
    ]
    assert min(abs(entry["eval/loss"] - value) for entry in logged if entry["step"] == 12) < 1e-6


@pytest.mark.slow
def test_what_is_shared_starts_equal_and_reads_the_same(ablation: tuple[Path, str]) -> None:
    gelu, diverged = read(ablation[0])["certificate"]
    assert gelu["status"] == "certified" and gelu["axes"] == ["ffn"]
    assert {change["key"] for change in gelu["changes"]} == {"ffn.use"}
    assert all(run["bitwise_equal"] == run["shared_parameters"] > 10 for run in gelu["runs"])
    assert all(run["batches"] == run["batches_equal"] == 12 for run in gelu["runs"])
    assert diverged["runs"][0]["bitwise_equal"] == diverged["runs"][0]["shared_parameters"]


@pytest.mark.slow
def test_the_page_opens_alone(ablation: tuple[Path, str]) -> None:
    text = (ablation[0] / "report.html").read_text()
    assert Checked.whole(text) and "https://" not in text.replace("https://arxiv.org", "")
    for word in (
        "verdict",
        "Certificate",
        "Every seed",
        "What it costs",
        "Failures",
        "data:image/png;base64",
    ):
        assert word in text
    assert (ablation[0] / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_runs_are_found_again_by_what_they_depend_on(
    ablation: tuple[Path, str], place: Path
) -> None:
    again = start(
        place, "--swap", "ffn=gelu", "--swap", "norm=rmsnorm", "--seeds", 2, "--out", "other"
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("found, held-out loss") == 4
    assert again.stdout.count("done, held-out loss") == 2
    before, after = read(ablation[0]), read(place / "other")
    assert before["arms"][:2] == after["arms"][:2]
    assert before["comparisons"][0]["delta"] == after["comparisons"][0]["delta"]


@pytest.mark.slow
def test_another_question_does_not_overwrite_a_report(
    ablation: tuple[Path, str], place: Path
) -> None:
    done = start(place, "--swap", "norm=rmsnorm", "--seeds", 2, "--out", "out")
    assert done.returncode == 2 and "--out" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_started_again_it_ends_the_same(
    ablation: tuple[Path, str], place: Path, tmp_path: Path, number: signal.Signals
) -> None:
    options = [
        "--swap",
        "ffn=gelu",
        "--seeds",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--store",
        str(tmp_path / "store"),
    ]
    command = [sys.executable, "-m", *words(place, *options)]
    surroundings = environment(LSWT_CACHE_DIR=place / "cache")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=place, env=surroundings
    ) as process:
        assert process.stdout is not None
        assert any("done, held-out loss" in line for line in process.stdout)
        until(lambda: any(under_way(directory) for directory in (tmp_path / "store").iterdir()))
        process.send_signal(number)
        printed, _ = process.communicate()
    assert ("missing seeds" in printed) == (number == signal.SIGINT)
    assert process.returncode == (75 if number == signal.SIGINT else -signal.SIGKILL)
    done = start(place, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, restarted = read(ablation[0]), read(tmp_path / "out")
    assert [arm["final_loss"] for arm in restarted["arms"]] == [
        arm["final_loss"] for arm in whole["arms"][:2]
    ]
    assert restarted["certificate"][0]["status"] == "certified"
    assert all(
        run["batches_equal"] == run["batches"] == 12 for run in restarted["certificate"][0]["runs"]
    )
    kept = sorted((tmp_path / "store").glob("*/outcome.json"))
    assert len(kept) == 4
    for path in kept:  # all that a report is made of, but for what was measured
        outcomes = []
        for store in (tmp_path / "store", place / "runs" / "store"):
            outcome = json.loads((store / path.parent.name / path.name).read_text())
            outcomes.append({key: outcome[key] for key in outcome.keys() - MEASURED.keys()})
        assert outcomes[0] == outcomes[1]
    curves = [
        (out / "report-curves.csv").read_text().splitlines()
        for out in (tmp_path / "out", ablation[0])
    ]
    assert curves[0] == [line for line in curves[1] if "optimizer.lr" not in line]


@pytest.mark.slow
def test_a_run_reads_no_input_and_ends_with_whoever_started_it(place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "long.toml"
    recipe.write_text((place / "nano.toml").read_text().replace("steps = 12", "steps = 1000000"))
    end, parent = os.pipe()
    command = [
        sys.executable,
        "-m",
        "lswt_core.ablation.runs.worker",
        str(recipe),
        str(tmp_path / "run"),
        "--parent",
        str(end),
    ]
    surroundings = environment(LSWT_CACHE_DIR=place / "cache")
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, pass_fds=[end], env=surroundings, **silent) as process:
        os.close(end)
        until(lambda: process.poll() is not None or under_way(tmp_path / "run"))
        os.close(parent)  # as a parent's death does
        assert process.wait(60) == 75
    assert under_way(tmp_path / "run")


def under_way(run: Path) -> bool:
    """Whether a run has saved something, and is not done."""
    return any((run / "checkpoints").glob("step-*")) and not (run / "outcome.json").exists()


def until(condition: Any) -> None:
    """Wait for something that happens soon."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------- arms and certificates


def arms(place: Path, *more: str) -> tuple[str, list[Any], dict[str, Any]]:
    from lswt_core.__main__ import build_parser

    return read_arms(build_parser().parse_args(["ablate", *more]))


def test_swaps_become_arms() -> None:
    path, swaps = Path("r.toml"), ["ffn=gelu", "ffn=geglu", "memory.xl=false"]
    single = lay_out_arms("one-at-a-time", path, swaps, (), "here")
    assert [arm.name for arm in single] == ["baseline", *swaps]
    assert [arm.axes for arm in single[1:]] == [("ffn",), ("ffn",), ("memory.xl",)]
    every = lay_out_arms("factorial", path, swaps, (), "here")
    assert len(every) == 3 * 2 and every[-1].axes == ("ffn", "memory.xl")
    added = lay_out_arms("add-one-in", path, ["ffn=gelu", "memory.xl=false"], (), "here")
    assert added[0].overrides == ("ffn.use=gelu", "memory.xl=false")
    assert [(arm.name, arm.overrides) for arm in added[1:]] == [
        ("without ffn=gelu", ("memory.xl=false",)),
        ("without memory.xl=false", ("ffn.use=gelu",)),
    ]
    with pytest.raises(RecipeError, match='"ffn"'):
        lay_out_arms("add-one-in", path, swaps, (), "here")


@pytest.mark.parametrize(
    ("swap", "axes"),
    [
        ("ffn=gelu", ["ffn"]),
        ("ffn.use=gelu", ["ffn"]),
        ("memory.xl=false", ["memory.xl"]),
        ("memory.registers=true", ["memory.registers"]),
        ("positional.base=1e4", ["positional.base"]),
        ('layers."every 2".ffn=gelu', ["layers"]),
        ("mixer=mamba2, memory.xl=false,positional=none", ["mixer", "memory.xl", "positional"]),
    ],
)
def test_a_swap_is_about_the_keys_that_it_names(swap: str, axes: list[str]) -> None:
    assert list(axes_of_swap(swap)) == axes


def test_a_swap_of_several_keys_is_one_arm() -> None:
    path, several = Path("r.toml"), "mixer=mamba2,memory.xl=false"
    (_, arm) = lay_out_arms("one-at-a-time", path, [several], (), "here")
    assert (arm.name, arm.swaps, arm.axes) == (several, (several,), ("mixer", "memory.xl"))
    assert arm.overrides == ("mixer.use=mamba2", "memory.xl=false")
    swaps = [several, "ffn=gelu", "memory.xl=false"]
    every = [arm.swaps for arm in lay_out_arms("factorial", path, swaps, (), "here")]
    assert (several, "ffn=gelu") in every and (several, "memory.xl=false") not in every
    with pytest.raises(RecipeError, match=r'"memory\.xl"'):
        lay_out_arms("add-one-in", path, swaps, (), "here")


def test_a_swap_of_several_keys_needs_no_allowance(dry_run: Callable[..., Done]) -> None:
    swap = "mixer=mamba2,memory.xl=false,memory.registers=false,positional=none"
    done = dry_run("--swap", swap)
    assert done.returncode == 0, done.stderr


INNER = """from torch import Tensor

from lswt_core.hooks import hookimpl
from lswt_core.interfaces import Dims, FeedForward, Norm


class Normed(FeedForward):
    name, citation = "normed", "@misc{own}"

    def __init__(self, dims: Dims, *, ffn: FeedForward, norm: Norm):
        super().__init__(dims)
        self.ffn, self.norm = ffn, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.ffn(x))


@hookimpl
def lswt_components():
    return [Normed]
"""


def test_what_a_component_contains_is_part_of_its_swap(
    place: Path, dry_run: Callable[..., Done]
) -> None:
    """Also what is of another kind, here a norm of the feed-forward layer's own."""
    (place / "normed.py").write_text(INNER)
    plugin = ("--plugin", "normed.py", "--unchecked")
    inner = ("ffn.use=normed", "ffn.ffn.use=gelu", "ffn.norm.use=layernorm")
    for before, swap in (
        (inner, "ffn.norm.use=rmsnorm"),
        ((), ",".join(inner)),
    ):
        done = dry_run(*plugin, *before, "--swap", swap)
        assert done.returncode == 0, done.stderr


FILE = """recipe = "nano.toml"
seeds = 3
margin = 0.02
set = ["train.steps=8"]
probe = ["sinks"]
[swap]
ffn = ["gelu", "geglu"]
memory.xl = false
[arm."small lr"]
set = ["optimizer.lr=1e-4"]
"""


def test_an_ablation_file_says_all_of_it(place: Path, dry_run: Callable[..., Done]) -> None:
    (place / "study.toml").write_text(FILE)
    name, specs, settings = arms(place, str(place / "study.toml"), "--seeds", "4")
    assert name == "study"
    assert [arm.name for arm in specs] == [
        "baseline",
        "ffn=gelu",
        "ffn=geglu",
        "memory.xl=false",
        "small lr",
    ]
    assert all(arm.overrides[0] == "train.steps=8" for arm in specs)
    tuning = {"tune": (), "tuning_seeds": 3, "horizons": (), "probes": ("sinks",)}
    rest = {"match": "none", "allow": [], "looks": (), "sequential": False, **tuning}
    assert settings == {"seeds": 4, "margin": 0.02, **rest}, "the command line wins"
    done = dry_run()
    assert done.returncode == 2 and "--swap" in done.stderr


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ('recipe = "nano.toml"\nsedes = 3', "study.toml:2", "sedes"),
        ('recipe = "nano.toml"\nseeds = 0', "study.toml:2", "seeds"),
        ('recipe = "nano.toml"\n[arm.x]\naxis = ["ffn"]', "study.toml:2", '"x"'),
        (
            'recipe = "nano.toml"\n[swap]\nffn = "gelu"\n[arm."ffn=gelu"]\nset = ["ffn.use=gelu"]',
            "study.toml:4",
            '"ffn=gelu"',
        ),
    ],
)
def test_a_wrong_ablation_file_is_answered_with_the_line(
    place: Path, text: str, where: str, what: str
) -> None:
    (place / "study.toml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        arms(place, str(place / "study.toml"))
    (problem,) = caught.value.problems
    assert problem.where.endswith(where) and what in problem.what


def test_an_arm_that_changes_more_than_its_axis_is_refused_with_the_line(
    place: Path, dry_run: Callable[..., Done]
) -> None:
    (place / "gelu.toml").write_text(
        'extends = "nano.toml"\n[ffn]\nuse = "gelu"\n[optimizer]\nlr = 1e-3\n'
    )
    done = dry_run("--arm", "gelu.toml")
    assert done.returncode == 2
    assert "0.001" in done.stderr and "0.002" in done.stderr
    assert "gelu.toml:5" in done.stderr
    assert "--allow optimizer.lr" in done.stderr
    allowed = dry_run("--arm", "gelu.toml", "--allow", "optimizer.lr")
    assert allowed.returncode == 0 and "optimizer.lr" in allowed.stdout


def test_losses_on_other_texts_are_not_compared(dry_run: Callable[..., Done]) -> None:
    swapped = dry_run("--swap", "evaluate.tokens=512")
    assert swapped.returncode == 2
    assert "--allow data" in swapped.stderr


def recipes(place: Path, **arms: list[str]) -> dict[str, Recipe]:
    return {name: Recipe.load(place / "nano.toml", overrides) for name, overrides in arms.items()}


CPU = torch.device("cpu")


def test_an_arm_with_position_biases_and_its_baseline_share_a_kernel(place: Path) -> None:
    shared = share_attention(recipes(place, base=[], gelu=["ffn.use=gelu"]), Registry(), CPU)
    assert shared is not None
    assert shared.name == shared.baseline_choice == "blocked"
    assert not shared.note()
    shared = share_attention(
        recipes(place, base=[], biased=["positional.use=alibi"], own=["attention.use=eager"]),
        Registry(),
        CPU,
    )
    assert shared is not None
    assert (shared.name, shared.baseline_choice) == ("sdpa", "blocked")
    assert "biased" in shared.note() and "blocked" in shared.note()
    assert shared.overrides == dict.fromkeys(("base", "biased"), ('attention.prefer=["sdpa"]',)), (
        "a named backend stays"
    )
    assert (
        share_attention(
            recipes(place, base=["attention.use=eager"], biased=["positional.use=alibi"]),
            Registry(),
            CPU,
        )
        is None
    )
    narrow = 'attention.prefer=["blocked"]'
    with pytest.raises(Incompatible, match="biased"):
        share_attention(
            recipes(place, base=[narrow], biased=[narrow, "positional.use=alibi"]),
            Registry(),
            CPU,
        )


@pytest.mark.parametrize(
    "layers",
    [
        'attention.prefer=["blocked", "sdpa"]',
        'layers."every 2".attention={prefer=["blocked", "sdpa"]}',
        'layers.0.attention.use="sdpa"',
    ],
)
def test_the_shared_kernel_is_every_layers_and_the_report_says_so(place: Path, layers: str) -> None:
    more = {"baseline": (layers,), "biased": (layers, "positional.use=alibi")}
    variants = [
        ArmSpec(name, (name,), place / "nano.toml", words, ("positional",))
        for name, words in more.items()
    ]
    spec = AblationSpec("x", variants, 1, "none", "d_ffn", 0.01, [], None, "ablate")
    ablation = Ablation(spec, Registry(), World.read(), print)
    ablation.build(Recipe.load(place / "nano.toml", more["baseline"]))
    assert [one.structure.kernels["attention"] for one in ablation.arms] == ["sdpa", "sdpa"]
    settings = ablation.settings(Workers(1, 1, [], []))
    assert settings["attention"] == "sdpa"
    assert "sdpa" in settings["notes"][0]
    results = study(arm("baseline", [3.0]), arm("x", [2.9]))
    assert (
        settings["notes"][0]
        in list_limits(make_report(replace(results, settings=results.settings | settings)))[-1]
    )


def test_a_value_that_only_the_baseline_writes_is_located_in_the_baseline(place: Path) -> None:
    text = (place / "nano.toml").read_text()
    (place / "other.toml").write_text(
        text.replace('[memory.xl]\nuse = "xl-cache"\nlength = 16', "")
    )
    baseline, arm = (Recipe.load(place / name) for name in ("nano.toml", "other.toml"))
    line = text.splitlines().index("[memory.xl]") + 1
    places = {change.key: change.where for change in diff_recipes(baseline, arm)}
    assert places == {
        "memory.xl.use": f"{place / 'nano.toml'}:{line + 1}",
        "memory.xl.length": f"{place / 'nano.toml'}:{line + 2}",
    }


def test_what_a_swap_is_about() -> None:
    def change(key: str, before: object, after: object, where: str = "command line") -> Change:
        return Change(key, before, after, where)

    loss = [
        change("loss.new.use", None, "new"),
        change("loss.new.weight", None, 0.1),
        change("loss.new.power", None, 2),
    ]
    assert resolve_axes(loss, ("loss.new.weight",)) == ("loss.new",), (
        "whoever sets the weight of a new loss adds it"
    )
    assert resolve_axes(
        [change(one.key, one.after, one.before) for one in loss], ("loss.new.weight",)
    ) == ("loss.new",)
    assert resolve_axes([change("loss.old.weight", 1.0, 0.1)], ("loss.old.weight",)) == (
        "loss.old.weight",
    )
    steps = [
        change("schedule.use", "cosine", "constant", "a.toml:5"),
        change("schedule.floor", 0.1, None, "a.toml:5"),
    ]
    steps += [
        change("optimizer.use", "sophia-g", "lion", "b.toml:4"),
        change("train.grad_clip", 1.0, 2.0, "b.toml:6"),
    ]
    assert resolve_axes(steps, None, ["a.toml", "b.toml"]) == ("schedule", "optimizer"), (
        "one of each file that leads to the arm"
    )
    assert resolve_axes(steps, None) == ("schedule",)


@pytest.mark.parametrize(
    "swap",
    ["attention=eager", "train.precision=bfloat16", "memory.registers=false", "model.d_ffn=48"],
)
def test_a_clean_swap_passes(dry_run: Callable[..., Done], swap: str) -> None:
    done = dry_run("--swap", swap)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("swap", "what"),
    [
        ("ffn=swiglu", "changes nothing"),
        ("ffn=gelluu", 'unknown ffn "gelluu"'),
        ("ffn", "AXIS=VALUE"),
        ("memory.xll=false", "cannot remove"),
    ],
)
def test_a_swap_that_cannot_be_is_answered(
    dry_run: Callable[..., Done], swap: str, what: str
) -> None:
    done = dry_run("--swap", swap)
    assert done.returncode == 2 and what in done.stderr and "Traceback" not in done.stderr


def parameter(value: str, owner: str = "attention") -> dict[str, Any]:
    return {"shape": "[2]", "owners": ["decoder", owner], "sha256": value}


def test_a_start_that_is_not_shared_is_seen() -> None:
    one = RunRecord({"a": parameter("x"), "f": parameter("y", "ffn.gelu")}, ["1", "2", "3"])
    other = RunRecord({"a": parameter("z"), "f": parameter("w", "ffn.swiglu")}, ["1", "5", "3"])
    common, flaws = check_records(one, other, ["ffn"])
    assert (common.shared_parameters, common.bitwise_equal, common.batches_equal) == (1, 0, 2)
    assert [flaw.about for flaw in flaws] == [
        "initialisation",
        "data",
    ]
    assert "batch 2" in flaws[1].text
    assert not check_records(one, one, ["ffn"])[1]
    assert not check_records(
        one, RunRecord(one.parameters | {"f": parameter("w", "ffn.swiglu")}, one.batches), ["ffn"]
    )[1]
    assert not check_records(one, RunRecord(one.parameters, ["1", "2"]), ["ffn"])[1], (
        "a run that diverged has read less"
    )


# ---------- matched budgets


@pytest.mark.parametrize("what", ["params", "flops"])
def test_budgets_are_matched_by_a_free_size(dry_run: Callable[..., Done], what: str) -> None:
    done = dry_run("model.n_layers=1", "--swap", "ffn=gelu", "--match", what)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "matched by" in line)
    # 3/2 of 128: two matrices for three
    assert "model.d_ffn=19" in line and abs(float(line.rpartition(" ")[2].rstrip("%"))) < 1.0


def test_a_budget_that_the_swap_itself_decides_is_refused(dry_run: Callable[..., Done]) -> None:
    done = dry_run("--swap", "model.d_ffn=48", "--match", "params")
    assert done.returncode == 2
    assert "--knob n_layers" in done.stderr


def test_the_solver_finds_the_nearest_size() -> None:
    # exact only without rounding to eights
    assert match_size("x", "k", 100, 10_007, lambda size: 7 * size + 7).size == 1429
    assert match_size("x", "k", 100, 80_008, lambda size: 100 * size + 8).size == 800
    with pytest.raises(UsageError, match="k = 1,"):
        match_size("x", "k", 10, 1000, lambda size: 900 * size)
    with pytest.raises(UsageError, match="small"):
        match_size("x", "k", 10, 10, lambda size: 900 * size)


# ---------- reports


class Checked(HTMLParser):
    """Whether every element is closed, and nothing is loaded."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open += [] if tag in self.VOID else [tag]
        self.loads += [
            value or ""
            for name, value in attrs
            if name in ("src", "href") and not (value or "").startswith("data:")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @classmethod
    def whole(cls, text: str) -> bool:
        page = cls()
        page.feed(text)
        return not page.open and not page.loads


def outcome(seed: int, loss: float, **more: Any) -> Outcome:
    curve = [(64 * step, loss + 1 / step) for step in range(1, 20)]
    defaults: dict[str, Any] = {
        "loss": loss,
        "documents": [("a", 90 * loss, 90), ("b", 10 * loss, 10)],
        "curve": curve,
        "evaluations": curve[::6],
        "positions": [(0, loss + 0.5, 4), (2, loss, 90)],
        "probes": {"isotropy": 0.4},
        "tokens_per_second": 1000.0,
        "peak_bytes": 10**9,
        "seconds": 3.0,
    }
    return Outcome(seed, **(defaults | more))


def arm(name: str, losses: list[float | None]) -> ArmResult:
    outcomes = [
        Outcome.failed(i, "out of memory <b>") if loss is None else outcome(i, loss)
        for i, loss in enumerate(losses)
    ]
    return ArmResult(name, name, [], 1000, 1000, 6000, 1280, {"ffn": 1000}, [], outcomes)


def study(*arms: ArmResult, margin: float = 0.01) -> Study:
    settings = {
        "seeds": list(range(len(arms[0].outcomes))),
        "confidence": 0.95,
        "margin": margin,
        "steps": 20,
        "tokens": 1280,
    }
    return Study("study <1>", list(arms), settings, [], {}, "[model]\n", "ablate")


STUDIES = {
    "one seed": study(arm("baseline", [3.0]), arm("x", [2.9])),
    "no noise": study(arm("baseline", [3.0, 3.1]), arm("x", [3.0, 3.1])),
    "lost": study(
        arm("baseline", [3.0, 3.1, 3.2]), arm("x", [None, 3.0, 3.1]), arm("y", [None, None, None])
    ),
    "twelve": study(
        *(
            arm(
                "baseline" if i == 0 else f"a very long name of an arm, number {i}",
                [3.0, 3.1, 3.3 + i / 9],
            )
            for i in range(12)
        )
    ),
    "no baseline": study(arm("baseline", [None, None]), arm("x", [3.0, 3.1])),
    "not finished": study(
        arm("baseline", [3.0, 3.1]),
        replace(arm("x", [3.0]), outcomes=[outcome(0, 3.0), Outcome.unfinished(1)]),
    ),
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_can_be_reported(name: str, tmp_path: Path) -> None:
    printed = publish(Comparison(STUDIES[name]), tmp_path)
    report = read(tmp_path)
    assert len(report["arms"]) == len(STUDIES[name].arms)
    assert len(report["comparisons"]) == len(report["arms"]) - 1
    text = (tmp_path / "report.html").read_text()
    assert Checked.whole(text) and "<b>" not in text and "study &lt;1&gt;" in text
    for one in report["comparisons"]:
        assert one["verdict"] in printed and one["arm"][:20] in (tmp_path / "report.md").read_text()


def verdicts(comparison: dict[str, Any]) -> list[str]:
    return [one["verdict"] for one in comparison["comparisons"]]


def test_verdicts_say_no_more_than_is_known() -> None:
    assert verdicts(make_report(STUDIES["one seed"])) == ["not resolved"]
    assert verdicts(make_report(STUDIES["no noise"])) == ["equivalent"]
    assert verdicts(make_report(STUDIES["lost"])) == ["not resolved", "failed"]
    assert make_report(STUDIES["lost"])["comparisons"][0]["lost"] == 1
    assert verdicts(make_report(STUDIES["no baseline"])) == ["failed"]
    base = arm("baseline", [3.0, 3.1, 3.2, 3.05])
    clear = arm("clear", [2.9, 3.0, 3.11, 2.95])
    tiny = arm("tiny", [3.001, 3.101, 3.2011, 3.0509])
    noisy = arm("noisy", [2.8, 3.3, 3.1, 3.0])
    report = make_report(study(base, clear, tiny, noisy))
    assert verdicts(report) == ["better", "equivalent", "not resolved"]
    assert "though the difference is resolved" in report["comparisons"][1]["why"]
    assert report["comparisons"][2]["seeds_needed"] is None, "its interval contains 0"
    assert report["comparisons"][0]["seeds_needed"] <= 4
    assert "would have been resolved with a chance" in report["comparisons"][2]["why"]


BASE, LOW, HIGH = (
    [3.0, 3.1, 3.2, 3.05, 3.1],
    [2.9, 3.0, 3.11, 2.95, 3.0],
    [3.1, 3.2, 3.31, 3.15, 3.2],
)


def failing(losses: list[float], times: int) -> list[float | None]:
    """The same losses, of which the first few are lost."""
    return [None] * times + losses[times:]


@pytest.mark.parametrize(
    ("of_baseline", "of_arm", "losses", "expected"),
    [
        (0, 3, LOW, "not resolved"),
        (0, 1, LOW, "not resolved"),
        (0, 2, BASE, "not resolved"),
        (0, 2, HIGH, "worse"),
        (2, 2, LOW, "better"),
        (2, 0, LOW, "better"),
        (2, 0, HIGH, "not resolved"),
        (2, 0, BASE, "not resolved"),
    ],
)
def test_the_runs_that_are_left_do_not_speak_for_those_that_failed(
    of_baseline: int, of_arm: int, losses: list[float], expected: str
) -> None:
    actual = make_report(
        study(arm("baseline", failing(BASE, of_baseline)), arm("x", failing(losses, of_arm)))
    )
    assert verdicts(actual) == [expected]
    assert actual["comparisons"][0]["failed"] == {"arm": of_arm, "baseline": of_baseline}
    assert [len(one["failures"]) for one in actual["arms"]] == [of_baseline, of_arm]
    for text in forms(actual):
        assert all(f"{count} of 5" in text for count in (of_baseline, of_arm))


def forms(report: dict[str, Any]) -> tuple[str, str, str]:
    """A report as it is printed, as Markdown and as a page."""
    return render_terminal(report), render_markdown(report), render_page(report, {})


@pytest.mark.parametrize(
    ("speeds", "at_once", "shown"),
    [
        ([900.0, 910.0, 905.0], 1, "-9.5% (-10.7% .. -8.3%)"),
        ([900.0, 910.0, 905.0], 2, "noise"),
        ([900.0, 1100.0, 950.0], 1, "noise"),
        ([1000.0, 1000.0, 1000.0], 1, "equal"),
        ([900.0], 1, "noise"),
    ],
)
def test_speed_is_compared_by_pairs_or_called_noise(
    speeds: list[float], at_once: int, shown: str
) -> None:
    def runs(name: str, values: list[float]) -> ArmResult:
        more = [{"tokens_per_second": value, "runs_at_once": at_once} for value in values]
        outcomes = [outcome(seed, 3.0, **one) for seed, one in enumerate(more)]
        return replace(arm(name, []), outcomes=outcomes)

    report = make_report(study(runs("baseline", [1000.0] * len(speeds)), runs("x", speeds)))
    cost = report["comparisons"][0]["costs"]["tokens_per_second"]
    assert (cost["seeds"], cost["shared"]) == (len(speeds), at_once > 1)
    printed, *pages = forms(report)
    assert shown in printed
    for text in pages:
        assert shown in text and ("shared the machine" in text) == (at_once > 1)


STATISTICS = (
    "paired_test",
    "equivalence_test",
    "clear_p",
    "valid_p",
    "nominal_level",
    "correlation",
    "fmean",
    "sample_std",
    "median",
)
ELSEWHERE = (
    "held_out_text.bootstrap_documents",
    "seed_plans.power",
    "seed_plans.seeds_needed",
    "seed_plans.equivalence_seeds",
    "seed_plans.std_upper_limit",
)


@pytest.mark.parametrize("statistic", [*(f"compare.{name}" for name in STATISTICS), *ELSEWHERE])
@pytest.mark.parametrize(
    "result", [float("nan"), ValueError("it does not converge")], ids=["nan", "raises"]
)
def test_a_statistic_that_fails_costs_no_report(
    statistic: str, result: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> object:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(f"lswt_core.ablation.report.{statistic}", broken)
    report = make_report(study(arm("baseline", BASE), arm("x", LOW), arm("y", HIGH)))
    reasons = [
        why for one in (*report["comparisons"], *report["arms"]) for why in one["unknown"].values()
    ]
    assert reasons
    assert {*verdicts(report)} <= {"better", "worse", *SMALL, "not resolved"}
    assert json.dumps(report, allow_nan=False)
    assert all("unknown" in text and reasons[0] in text for text in forms(report))


def test_a_study_whose_test_fails_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lswt_core.ablation.report.compare.paired_test", lambda *_: (math.inf,))
    publish(Comparison(study(arm("baseline", BASE), arm("x", LOW))), tmp_path)
    assert verdicts(read(tmp_path)) == ["not resolved"] and (tmp_path / "report.html").is_file()


def test_outcomes_survive_as_json() -> None:
    one = outcome(3, 2.5)
    assert Outcome.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Outcome.from_json(Outcome.failed(1, "x").to_json()) == Outcome.failed(1, "x")


@pytest.mark.slow
def test_two_studies_share_a_store(place: Path, tmp_path: Path) -> None:
    """Each run is made once, whoever makes it, and both studies report the same."""
    surroundings, processes = environment(LSWT_CACHE_DIR=place / "cache"), []
    for number in (1, 2):
        options = ["--seeds", "1", "--store", tmp_path / "store", "--out", tmp_path / str(number)]
        command = [sys.executable, "-m", *words(place, "--swap", "ffn=gelu", *options)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=place, env=surroundings, **pipes))
    printed = "".join(process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], printed
    assert printed.count("done, held-out") == printed.count("found, held-out") == 2
    assert read(tmp_path / "1")["arms"] == read(tmp_path / "2")["arms"]


@pytest.mark.slow
def test_a_launcher_makes_the_same_runs(place: Path) -> None:
    study = ("--swap", "ffn=gelu", "--seeds", 1, "train.steps=2", "--store", "launched")
    done = start(place, *study, "--launcher", "nice -n 1 {command}")
    assert done.returncode == 0, done.stdout + done.stderr
    again = start(place, *study, "--jobs", 1)  # with all threads, as on a machine of its own
    assert again.stdout.count(": found, held-out loss") == 2, again.stdout
