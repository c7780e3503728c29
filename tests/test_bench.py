"""The benchmark: contenders do the same work, timing is right, and the command prints it."""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lswt_core.__main__ import main
from lswt_core.benchmark import interleave as clock
from lswt_core.benchmark import original
from lswt_core.benchmark.interleave import Spread, time_interleaved, time_per_call, time_ratio
from lswt_core.benchmark.ours import Ours, work_of
from lswt_core.benchmark.peers import PEERS, find_peer
from lswt_core.benchmark.runner import Benchmark, Rounds, data_sheet_utilisation
from lswt_core.benchmark.step_profile import profile_step
from lswt_core.benchmark.text_report import data_sheet_lines
from lswt_core.benchmark.work import Contender, Work
from lswt_core.budget.flops import Flops
from lswt_core.budget.speed import median_seconds
from lswt_core.cli.bench import chosen_recipes
from lswt_core.device import Precision, freeze_imports, keep_freed_memory
from lswt_core.errors import UsageError
from lswt_core.recipe import Recipe
from lswt_core.registry import Registry

CPU = torch.device("cpu")
RECIPE = """
[model]
d_model = 32
n_layers = 2
n_heads = 2
[embedding]
vocab_size = 61
d_vocab = 16
[positional]
use = "rope"
sink_frame = "reference"
[memory.registers]
count = 3
[memory.xl]
use = "xl-cache"
length = 8
[loss.simctg]
margin = 0.5
[optimizer]
use = "adamw"
lr = 3e-4
[train]
batch_size = 2
seq_len = 8
steps = 4
precision = "float32"
[data]
use = "stdlib"
[tokenizer]
use = "bytes"
"""
# the others compile, or need a library that cannot be installed beside these
EAGER_PEERS = ["llama", "x-transformers", "gpt"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "nano.toml"
    file.write_text(RECIPE)
    return file


def build_ours(path: Path, *overrides: str) -> tuple[Work, Ours]:
    registry = Registry()
    recipe = Recipe.load(path, list(overrides), registry=registry)
    work = work_of(recipe, registry, CPU)
    return work, Ours(work, recipe, registry, "ours")


def losses(contender: Contender, steps: int = 4) -> list[float]:
    return [float(contender.train(*pair)) for pair in islice(contender.work.batches(), steps)]


def decoded(contender: Contender, prompt: Tensor, count: int) -> list[int]:
    now = contender.prefill(prompt)
    assert now is not None
    ids = [int(now)]
    for _ in range(count - 1):
        now = contender.decode(now)
        ids.append(int(now))
    return ids


@pytest.mark.parametrize(
    "overrides",
    [(), ("loss.simctg=false",), ("embedding.trainable=false",)],
    ids=["simctg", "plain", "frozen"],
)
def test_the_original_code_computes_the_same_model(path: Path, overrides: tuple[str, ...]) -> None:
    work, ours = build_ours(path, *overrides)
    theirs = original.build_original(original.OriginalCode, work, ours)
    prompt = next(work.batches(seed=7))[0][:1]
    assert decoded(ours, prompt, 12) == decoded(theirs, prompt, 12)
    segments = list(islice(work.batches(seed=3), 3))
    for pair in segments:  # a text with memory, before training
        assert float(ours.evaluate(*pair)) == pytest.approx(float(theirs.evaluate(*pair)), abs=2e-6)
    # AdamW's groups decay differently
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-3)


@pytest.mark.parametrize("name", EAGER_PEERS)
def test_peers_do_the_same_work(path: Path, name: str) -> None:
    pytest.importorskip(PEERS[name].needs.replace("-", "_"))
    work, ours = build_ours(path)
    peer = find_peer(name)(work)
    count = [sum(p.numel() for p in contender.model.parameters()) for contender in (ours, peer)]
    assert count[1] == pytest.approx(count[0], rel=0.15)
    curve = losses(peer, 30)
    assert curve[0] == pytest.approx(math.log(61), abs=0.7) and curve[-1] < curve[0] - 0.03
    assert peer.evaluate(*next(work.batches())).isfinite()
    frozen = find_peer(name)(work._replace(trainable_embedding=False))
    assert any(not p.requires_grad and p.shape[0] == 61 for p in frozen.model.parameters())


@pytest.mark.parametrize("name", ["llama", "x-transformers"])
def test_peers_decode_with_a_cache_as_without(path: Path, name: str) -> None:
    pytest.importorskip(PEERS[name].needs.replace("-", "_"))
    work, _ = build_ours(path, "memory.xl=false")
    peer = find_peer(name)(work._replace(seq_len=16))
    peer.model.eval()
    prompt = torch.arange(5)[None]
    generated = decoded(peer, prompt, 4)
    for size in range(1, 4):
        again = peer.prefill(torch.cat((prompt, torch.tensor([generated[:size]])), dim=1))
        assert again is not None and int(again) == generated[size]


def test_batches_are_reproducible_and_contiguous(path: Path) -> None:
    work, _ = build_ours(path)
    first, second = (list(islice(work.batches(), 3)) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    inputs = torch.cat([inputs for inputs, _ in first], dim=1)
    labels = torch.cat([labels for _, labels in first], dim=1)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])  # rows go on where they stopped


def test_rounds_alternate_and_ratios_are_per_round() -> None:
    events: list[str] = []
    taken = time_interleaved(
        {name: partial(partial, events.append, name) for name in "abc"}, 2, CPU
    )
    assert "".join(events) == "abccba" and {len(times) for times in taken.values()} == {2}
    assert time_ratio({"a": [2.0, 9.0], "b": [1.0, 3.0]}, "a", "b") == Spread(2.5, 2.0, 3.0)


def test_batches_are_prepared_before_the_clock_starts(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, ours = build_ours(path)
    events: list[str] = []
    perf_counter, text = time.perf_counter, Work.batches
    monkeypatch.setattr(
        clock,
        "time",
        SimpleNamespace(perf_counter=lambda: events.append("clock") or perf_counter()),
    )

    def record(self: Work, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for pair in text(self, seed):
            events.append("text")
            yield pair

    monkeypatch.setattr(Work, "batches", record)
    measured = Benchmark(work, {"ours": ours}, Rounds(2, 2, 1), lambda _: None).run()
    assert measured["ours"]["steps"] == 6 and measured["ours"]["first_step_seconds"] > 0
    starts = [number for number, word in enumerate(events) if word == "clock"][::2]
    assert len(starts) == 12
    assert all(events[number : number + 2] == ["clock", "clock"] for number in starts)


def test_many_calls_share_one_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append("|"))
    assert time_per_call(partial(events.append, "."), torch.device("meta")) > 0
    assert (
        median_seconds(partial(events.append, "."), torch.device("meta"), repeats=1, calls=50) > 0
    )
    assert "".join(events) == f"|{'.' * 50}|{'.' * 50}|"


def test_mfu_is_the_share_of_the_data_sheets_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(*[4] * 10, Precision(torch.bfloat16, ""), torch.device("cuda"))
    flops = Flops(
        forward={},
        train=5 * 10**12,
        update_curvature=0,
        optimizer=0,
        conventional=6 * 10**12,
        six_n=4 * 10**12,
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    utilisation = data_sheet_utilisation(work, 0.1, flops)  # 160 tokens/s
    assert (
        utilisation is not None
        and utilisation["flops_per_second"] == 989.4e12
        and "H100" in utilisation["source"]
    )
    assert [utilisation[name] for name in ("necessary", "conventional", "six_n")] == pytest.approx(
        [800 / 989.4, 960 / 989.4, 640 / 989.4]
    )
    assert "989 TFLOP/s" in data_sheet_lines(utilisation)[0]
    assert "65% (MFU by 6 N)" in data_sheet_lines(utilisation)[0]
    assert (
        data_sheet_utilisation(work._replace(precision=Precision(torch.float32, "")), 0.1, flops)
        is None
    )
    # another chip
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert data_sheet_utilisation(work, 0.1, flops) is None and data_sheet_lines(None) == []


def test_peak_bytes_are_the_largest_allocation() -> None:
    def step() -> None:
        one = torch.empty(1 << 20, dtype=torch.uint8)
        two = torch.empty(1 << 21, dtype=torch.uint8)
        del one
        three = torch.empty(1 << 20, dtype=torch.uint8)
        del two, three

    assert profile_step(step, CPU).peak_bytes == pytest.approx(3 << 20, abs=1 << 12)


def test_keeping_freed_memory_can_be_switched() -> None:
    assert keep_freed_memory() is keep_freed_memory(False) is (platform.libc_ver()[0] == "glibc")


def test_libraries_are_left_out_of_garbage_collections_once() -> None:
    gc.unfreeze()
    freeze_imports.cache_clear()
    freeze_imports()
    frozen = gc.get_freeze_count()
    assert frozen > 10_000  # torch alone
    kept = [[number] for number in range(1000)]
    freeze_imports()
    assert gc.get_freeze_count() <= frozen and len(kept) == 1000


def test_the_baseline_of_peers_does_their_work(path: Path) -> None:
    arguments = argparse.Namespace(
        recipe=path, overrides=["embedding.d_vocab=8"], swap=[], against=["llama"]
    )
    own, alike, bare = chosen_recipes(arguments, Registry(), None).values()
    assert [recipe.embedding.d_vocab for recipe in (own, alike, bare)] == [
        8,
        own.model.d_model,
        own.model.d_model,
    ]
    assert own.many("loss") and not alike.many("loss") and alike.one("optimizer").name == "adamw"
    assert own.many("memory") and not bare.many("memory")


@pytest.mark.slow
def test_the_command_measures_and_compares(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [
        "--swap",
        "ffn=gelu",
        "--against",
        "original",
        "--against",
        "gpt",
        "--rounds",
        "2",
        "--tokens",
        "3",
    ]
    assert main(["bench", str(path), "optimizer.use=sophia-g", *more, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["contenders"]
    assert list(rows) == [
        "nano",
        "nano ffn=gelu",
        "nano, peers' work",
        "nano, peers' work, no memory",
        "original",
        "gpt",
    ]
    assert [rows[name]["baseline"] for name in ("nano ffn=gelu", "original", "gpt")] == [
        "nano",
        "nano, peers' work",
        "nano, peers' work, no memory",
    ]
    for name, row in rows.items():
        for kind in ("training", "evaluation"):
            span = row[kind]["seconds"]
            assert 0 < span["min"] <= span["median"] <= span["max"]
            assert row[kind]["tokens_per_second"] == pytest.approx(16 / span["median"])
        assert row["held_bytes"] > 4 * row["parameters"]
        assert row["step_peak_bytes"] > 0
        assert row["graph_breaks"] == 0
        assert (row["decoding"] is None) == (name == "gpt")
        assert row["loss"] < math.log(61) + 0.7 and row["steps"] == 6
    assert rows["original"]["loss"] == pytest.approx(rows["nano, peers' work"]["loss"], abs=0.01)
    assert {piece["name"] for piece in report["breakdown"]} == {
        "block",
        "vocabulary and cross-entropy",
        "loss simctg",
        "update by sophia-g",
    }
    assert report["utilisation"]["necessary"] > 0 and report["machine"]["attention"] == "blocked"
    assert main(["bench", str(path), *more]) == 0
    text = capsys.readouterr().out
    for word in (
        "training",
        "evaluation",
        "decoding",
        "times as long as",
        "a step's peak",
        "of its ceiling",
        "like nanoGPT",
    ):
        assert word in text


def test_invalid_arguments_are_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in [
        (["--against", "lama"], "did you mean llama"),
        (["--rounds", "0"], "at least 1"),
        (["--swap", "ffn=gelo"], "gelu"),
        (["--against", "none.toml"], "none.toml"),
    ]:
        assert main(["bench", str(path), *words]) != 0
        assert expected in capsys.readouterr().err


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "litgpt", None)
    with pytest.raises(UsageError, match="pip install litgpt"):
        find_peer("litgpt")


def test_another_recipe_must_read_as_many_tokens(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other: Any = tmp_path / "other.toml"
    other.write_text(RECIPE.replace("seq_len = 8", "seq_len = 16"))
    assert main(["bench", str(path), "--against", str(other)]) != 0
    assert f"{other} reads 32 tokens" in capsys.readouterr().err
