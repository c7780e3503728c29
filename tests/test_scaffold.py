"""``plugins new``: packages it writes are complete, right, short and work at once; names and places
it cannot use are refused.
"""

from __future__ import annotations

import ast
import csv
import importlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
from helpers import DIMS, ROOT, distance, slow_unless, stream, tiny, tokens
from lswt_eager import Eager
from lswt_registers import Registers
from lswt_rope import Rope
from nano import NANO

from lswt_core.__main__ import main
from lswt_core.interfaces import (
    IGNORE,
    AttentionRequirements,
    Batch,
    Horizon,
    Output,
    RunInfo,
    Unsupported,
)
from lswt_core.recipe.swap_syntax import overrides_of
from lswt_core.registry import Registry
from lswt_core.registry.kinds import KINDS
from lswt_core.run import main as run

every_kind = pytest.mark.parametrize("kind", KINDS)
MOST = 24  # statements of an example: about as many lines
RECIPE = (
    NANO
    + """
[memory.xl]
use = "xl-cache"
length = 24
[schedule]
warmup_steps = 2
[tokenizer]
use = "bytes"
[train]
batch_size = 2
seq_len = 16
precision = "float32"
steps = 3
[evaluate]
tokens = 64
batch_size = 2
[sample]
tokens = 4
"""
)


def example(kind: str) -> Any:
    """The example class of a kind."""
    return importlib.import_module(f"lswt_core.cli.scaffold.examples.{kind}").Example


def new(name: str, kind: str, where: Path) -> tuple[Path, str]:
    """Write a package; its folder and what was printed."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["plugins", "new", name, "--kind", kind, "--in", str(where)]) == 0
    return where / f"lswt-{name}", printed.getvalue()


def offer_of(module: Path) -> Any:
    """The one component a file offers."""
    (offer,) = Registry([], files=[module]).offers()
    return offer


# ---------- packages


@every_kind
def test_what_is_written_is_all_a_package_needs(kind: str, tmp_path: Path) -> None:
    folder, printed = new("my-own", kind, tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "pyproject.toml",
        "lswt_my_own.py",
        "test_lswt_my_own.py",
        "README.md",
    }
    project = tomli.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "lswt-my-own"
    assert project["project"]["entry-points"]["lswt"] == {"my-own": "lswt_my_own"}
    readme = (folder / "README.md").read_text()
    for text in (readme, printed):
        assert "plugins check lswt_my_own" in text
        assert "--out runs/my-own" in text
        assert "@" not in text.replace("@misc", "")
    assert f"pip install -e {folder}\n" in printed
    assert f"--plugin {folder}/lswt_my_own.py" in printed
    assert 'checks("lswt_my_own")' in (folder / "test_lswt_my_own.py").read_text()
    assert (
        ("ablate" in readme)
        == ("ablate" in printed)
        == (kind not in ("data", "tokenizer", "tracker"))
    )
    uses, swaps = (
        re.findall(r"quickstart.toml (\S+) --out", readme),
        re.findall(r"--swap (\S+)", readme),
    )
    assert [*map(overrides_of, swaps)] == [(use,) for use in uses][: len(swaps)] and len(uses) == 1


@every_kind
def test_a_component_says_everything_about_itself_without_being_imported(
    kind: str, tmp_path: Path
) -> None:
    module = new("my-own", kind, tmp_path)[0] / "lswt_my_own.py"
    # files of one content are one module, which another test may have imported
    module.write_text(f"{module.read_text()}# {tmp_path}\n")
    registry = Registry([], files=[module])
    offer = offer_of(module)
    assert offer.module not in sys.modules
    assert (offer.kind, offer.name) == (kind, "my-own")
    assert offer.doc
    assert offer.citation.startswith("@misc{lswt_my_own,")
    assert all(
        "Annotated" in str(option.annotation) or option.name in ("directory", "pattern")
        for option in offer.options
    )
    component = registry.load(offer)
    (live,) = Registry([sys.modules[component.__module__]]).offers()
    assert live._replace(distribution="file", version=offer.version) == offer
    assert component.__name__ == "MyOwn" and "xample" not in module.read_text()


def statements_of(component: ast.ClassDef) -> int:
    """The number of statements of a class, docstrings not counted."""
    return sum(
        isinstance(node, ast.stmt)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in ast.walk(component)
    )


@every_kind
def test_what_an_author_changes_is_short(kind: str, tmp_path: Path) -> None:
    text = (new("my-own", kind, tmp_path)[0] / "lswt_my_own.py").read_text()
    (component,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    assert statements_of(component) <= MOST
    assert "Change" in text or "take its place" in text


@pytest.mark.slow
def test_generated_code_is_clean_whatever_the_name(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    for kind in KINDS:
        for name in ("x", f"{kind.replace('_', '-')}-{'long-' * 9}"[:31] + "x"):
            new(name, kind, tmp_path)[0].rename(tmp_path / f"{kind}-{len(name)}")
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", str(tmp_path)]
    # as the project's own tests have it
    ignored = ["--config", 'lint.per-file-ignores={"test_*.py" = ["D"]}']
    for command in ([*ruff, "check", *ignored, *config], [*ruff, "format", "--check", *config]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# ---------- runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_unless(["memory", "loss", "data", "tokenizer"], KINDS))
def test_a_new_component_trains(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text(
        "It is a truth universally acknowledged, that a single man needs a wife.\n" * 60
    )
    (tmp_path / "nano.toml").write_text(RECIPE.format(corpus=tmp_path / "corpus.txt"))
    module = new("my-own", kind, tmp_path)[0] / "lswt_my_own.py"
    printed = new("my-other", kind, tmp_path)[1]
    (use,) = set(re.findall(r"quickstart.toml (.*?) --out", printed))
    small = ["data.directory=.", "data.pattern=*.txt", "data.held_out=2"] if kind == "data" else []
    (tmp_path / "other.txt").write_text(
        "However little known the feelings of such a man may be. " * 20
    )
    words = [
        "nano.toml",
        "--out",
        "run",
        "--plugin",
        str(module),
        *use.replace("my-other", "my-own").split(),
        *small,
    ]
    assert run(words) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and all(isinstance(loss, float) for loss in losses)
    components = json.loads((tmp_path / "run" / "environment.json").read_text())["components"]
    assert f"{kind}.my-own" in components and components[f"{kind}.my-own"].startswith("file ")
    assert kind != "loss" or all("loss/my-own" in line for line in lines if "loss" in line)
    assert kind != "tracker" or "3,loss," in (tmp_path / "run" / "my-own.csv").read_text()


# ---------- what the examples compute


def test_the_positional_encoding_is_a_slope_per_head_and_streams() -> None:
    bias = example("positional")(DIMS, steepest=0.25).bias(
        torch.zeros(1, 1, 2, 8), torch.tensor([3]), torch.tensor([-2, 3])
    )
    assert bias.dense().tolist() == [[[-1.25, 0.0]], [[-0.625, 0.0]]]
    decoder = tiny(
        positional=example("positional"),
        memories={"kept": lambda dims: example("memory")(dims, length=32)},
    )
    assert distance(stream(decoder, tokens(2, 17), 5), decoder(tokens(2, 17))[0]) < 1e-12


def test_the_memory_streams_and_keeps_no_more_than_its_length() -> None:
    decoder, ids = (
        tiny(memories={"kept": lambda dims: example("memory")(dims, length=32)}),
        tokens(2, 17),
    )
    assert max(distance(stream(decoder, ids, size), decoder(ids)[0]) for size in (1, 7)) < 1e-12
    short = tiny(memories={"kept": lambda dims: example("memory")(dims, length=3)})
    state: Any = None
    for first in range(0, 8, 4):
        _, state = short(ids[:, first : first + 4], state)
    assert state[0]["kept"]["k"].shape[:2] == (2, 3) and not state[0]["kept"]["v"].requires_grad


@pytest.mark.parametrize("positional", ["none", "slopes"])
@pytest.mark.parametrize("queries", [1, 3, 64])
def test_the_attention_is_everybodys(queries: int, positional: str) -> None:
    parts = {"memories": {"registers": Registers, "kept": example("memory")}}
    parts |= {"positional": example("positional") if positional == "slopes" else Rope}
    ids, first_visible = tokens(2, 10), torch.tensor([[0] * 4 + [4] * 6, [0] * 10])
    states = stream(
        tiny(attention=lambda dims: example("attention")(dims, queries=queries), **parts),
        ids,
        5,
        first_visible,
    )
    assert distance(states, stream(tiny(attention=Eager, **parts), ids, 5, first_visible)) < 1e-12
    with pytest.raises(Unsupported, match="second derivative"):
        example("attention")(DIMS).require(
            AttentionRequirements("cpu", torch.float32, 8, double_backward=True)
        )


def test_the_norms_are_what_they_say() -> None:
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads, whole = (
        example("qk_norm")(DIMS, start=3.0).double(),
        example("norm")(DIMS, eps=0.5).double(),
    )
    heads.reset_parameters()
    whole.reset_parameters()
    assert distance(heads(x).norm(dim=-1), torch.full((2, 3, 2), 3.0)) < 1e-12
    assert distance(heads(x), heads(7 * x)) < 1e-12
    wide = x.flatten(-2)  # [2, 3, 16]
    assert distance(whole(wide), torch.nn.functional.rms_norm(wide, (16,), eps=0.5)) < 1e-12


def test_the_head_scales_its_input_alone() -> None:
    dims, ids = DIMS._replace(vocab_size=7, d_vocab=5), tokens(2, 3, size=7)
    head = example("head")(dims, scale=3.0)
    states = torch.ones(2, 3, DIMS.d_model)
    torch.nn.init.normal_(head.table.weight)
    embedded = torch.nn.functional.embedding(ids, head.table.weight)
    assert distance(head.embed(ids), 3 * head.input(embedded)) < 1e-6
    assert distance(head.logits(states), head.output(states) @ head.table.weight.T) < 1e-6


def test_the_feed_forward_layer_is_gated() -> None:
    layer = example("ffn")(DIMS, sharpness=2.0).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = x @ layer.fc1.weight.T + layer.fc1.bias
    gate = 1 / (1 + (-2 * hidden[..., 24:]).exp())
    assert (
        distance(layer(x), (hidden[..., :24] * gate) @ layer.fc2.weight.T + layer.fc2.bias) < 1e-12
    )


def test_the_loss_is_what_the_predictions_lack_in_entropy() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 0]])
    term = example("loss")(DIMS, temperature=2.0)(
        Output(torch.zeros(2, 3, 4), logits), Batch(labels, labels)
    )
    entropies = [
        torch.distributions.Categorical(logits=logits[b, t] / 2).entropy()
        for b, t in ((0, 0), (0, 2), (1, 2))
    ]
    assert distance(term.total, 3 * math.log(5) - sum(entropies)) < 1e-12 and int(term.count) == 3
    flat = example("loss")(DIMS)(
        Output(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)), Batch(labels, labels)
    )
    assert float(flat.total) == pytest.approx(0.0, abs=1e-6)


def test_the_optimizer_is_torchs() -> None:
    results = []
    for build in (example("optimizer"), torch.optim.NAdam):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        more: dict[str, Any] = (
            {"betas": (0.9, 0.95), "decoupled_weight_decay": True}
            if build is torch.optim.NAdam
            else {}
        )
        optimizer = build([{"params": [p]}], lr=0.1, weight_decay=0.5, **more)
        for _ in range(3):
            p.grad = 2 * p.detach()
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results) and float(results[0].abs().sum()) < 3


def test_the_schedule_rises_and_falls_in_straight_lines() -> None:
    factor = example("schedule")(
        Horizon(steps=100, tokens_per_step=1), warmup=0.2, floor=0.5
    ).factor
    assert [factor(step) for step in (10, 20, 60, 100, 120)] == pytest.approx(
        [0.5, 1.0, 0.75, 0.5, 0.5]
    )


def test_the_data_source_reads_a_directory(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    source = example("data")(directory=str(tmp_path), pattern="*.txt", held_out=3)
    assert [
        [document.text for document in source.documents(split)] for split in ("train", "valid")
    ] == [
        ["text 1", "text 2", "text 4"],
        ["text 0", "text 3"],
    ]
    before = source.fingerprint()
    assert before == source.fingerprint()
    (tmp_path / "4.txt").write_bytes(b"\xff")
    with pytest.raises(Exception, match=r"4\.txt.*data\.pattern"):
        source.fingerprint()
    (tmp_path / "4.txt").write_text("another")
    assert source.fingerprint() != before
    assert next(example("data")().documents("train")).text


@pytest.mark.parametrize("text", ["", "plain", "naïve — “quoted” 𝄞\n", "ä" * 3])
def test_the_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = example("tokenizer")(characters="ä—ä")
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode([256, *ids, 257, 9999]) == text
    assert all(number < tokenizer.vocab_size == 260 for number in ids)
    assert len(ids) == sum(
        1 if character in "ä—" else len(character.encode()) for character in text
    )
    assert tokenizer.fingerprint() != example("tokenizer")(characters="ä").fingerprint()


def test_the_tracker_writes_a_table(tmp_path: Path) -> None:
    for resumed in (False, False, True):
        tracker = example("tracker")(RunInfo("run", tmp_path, {}, resumed=resumed), every=2)
        for step in (1, 2):
            tracker.log({"loss": 0.5, "lr": 1e-3}, step)
        tracker.close()
    with (tmp_path / "example.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["2", "loss", "0.5"], ["2", "lr", "0.001"]] * 2


# ---------- names and places


@pytest.mark.parametrize(
    ("name", "kind", "fragments"),
    [
        ("MyVariant", "ffn", ["'MyVariant'", "lower-case", "because", "e.g. my-variant"]),
        ("a--b", "ffn", ["'a--b'", "e.g. a-b"]),
        ("2nd", "ffn", ["'2nd'", "e.g. my-variant"]),
        ("x" * 33, "ffn", ["at most 32 characters"]),
        ("true", "ffn", ["as a value", "my-true"]),
        (
            "swiglu",
            "ffn",
            ['the ffn "swiglu" exists already', "lswt-core", "lswt_swiglu", "choose another name"],
        ),
        ("auto", "attention", ['the attention "auto" exists already', "lswt-core"]),
        ("rope", "ffn", ["lswt_rope", "exists already", "lswt-core", "my-rope"]),
        ("core", "ffn", ["lswt_core", "exists already", "my-core"]),
        (
            "fine",
            "memroy",
            ['no kind of component "memroy"', 'did you mean "memory"?', "positional, memory"],
        ),
        ("fine", "zzzz", ['"zzzz"', "The kinds: head, block"]),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(
    name: str, kind: str, fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins", "new", name, "--kind", kind, "--in", str(tmp_path)]) == 2
    output = capsys.readouterr().err
    assert all(fragment in output for fragment in fragments), output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "called"),
    [
        ("memory", "memory", "MemoryComponent"),
        ("tensor", "ffn", "TensorComponent"),
        ("none", "ffn", "NoneComponent"),
        ("x1-y2", "ffn", "X1Y2"),
    ],
)
def test_a_class_hides_no_name_that_its_file_uses(
    name: str, kind: str, called: str, tmp_path: Path
) -> None:
    module = new(name, kind, tmp_path)[0] / f"lswt_{name.replace('-', '_')}.py"
    registry = Registry([], files=[module])
    assert registry.load(registry.find(kind, name)).__name__ == called


def test_a_component_that_is_known_by_a_file_clashes_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = new("my-own", "ffn", tmp_path)[0] / "lswt_my_own.py"
    other = tmp_path / "elsewhere"
    other.mkdir()
    assert (
        main(
            [
                "plugins",
                "new",
                "my-own",
                "--kind",
                "ffn",
                "--in",
                str(other),
                "--plugin",
                str(module),
            ]
        )
        == 2
    )
    assert '"my-own"' in capsys.readouterr().err


def test_nothing_is_written_over_and_nothing_half_written_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plugins", "new", "my-own", "--kind", "ffn", "--in"]
    taken = tmp_path / "lswt-my-own"
    taken.mkdir()
    assert main([*command, str(tmp_path)]) == 2
    assert str(taken) in capsys.readouterr().err
    assert list(taken.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    assert main([*command, str(file)]) == 2
    assert str(file) in capsys.readouterr().err
    assert main([*command, str(tmp_path / "not" / "there")]) == 0
    assert (tmp_path / "not" / "there" / "lswt-my-own" / "lswt_my_own.py").is_file()

    write: Callable[..., int] = Path.write_text

    def full(path: Path, text: str, **more: Any) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return write(path, text, **more)

    taken.rmdir()
    monkeypatch.setattr(Path, "write_text", full)
    assert main([*command, str(tmp_path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not taken.exists()
