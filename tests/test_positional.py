"""What every positional encoding promises, alone, in a model and in a run."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DIMS, distance, offered, stream, tiny, tokens
from lswt_eager import Eager
from lswt_flex import Flex
from lswt_registers import Registers
from lswt_rope import Rope, XPos
from lswt_sdpa import Sdpa
from lswt_xl_cache import XlCache
from nano import NANO
from position_parts import drawn, fill, filled, key_value, scores
from processes import run
from torch import Tensor

from lswt_core.interfaces import KeyValue
from lswt_core.plugin_api.encoded_blocks import encode_positions

BACKENDS = {"eager": Eager, "sdpa": Sdpa}
FIXED = [cls for cls in offered("positional") if not cls.length_dependent]
ROTARY = [cls for cls in FIXED if issubclass(cls, Rope)]
MEMORIES = {"registers": partial(Registers, count=3), "xl": partial(XlCache, length=1024)}
STRETCHED = {
    "xpos": {"scale_base": 3.0},
    "t5": {"buckets": 6, "max_distance": 9},
    "rope-yarn": {"trained_length": 40, "factor": 5.0},
    "cope": {"positions": 4},
}
every = pytest.mark.parametrize("cls", FIXED, ids=lambda cls: cls.name)
every_rotary = pytest.mark.parametrize("cls", ROTARY, ids=lambda cls: cls.name)


# ---------- every one


@every
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_means_the_same_however_it_is_cut(cls: Any, backend: str) -> None:
    ids = tokens(2, 45)
    decoder = tiny(
        positional=partial(cls, **STRETCHED.get(cls.name, {})),
        memories=MEMORIES,
        attention=BACKENDS[backend],
    )
    fill(decoder.positional)
    whole = decoder(ids)[0]
    assert max(distance(stream(decoder, ids, size), whole) for size in (1, 7, 45)) < 1e-12


@every
def test_a_memory_may_be_far_longer_than_the_segment(cls: Any) -> None:
    ids, decoder = (
        tokens(1, 700),
        tiny(positional=partial(cls, **STRETCHED.get(cls.name, {})), memories=MEMORIES),
    )
    fill(decoder.positional)
    _, state = decoder(ids[:, :697])
    assert distance(decoder(ids[:, 697:], state)[0], decoder(ids)[0][:, 697:]) < 1e-12


@every
def test_scores_are_finite_and_right_in_single_precision_however_far_a_key(cls: Any) -> None:
    encoding, q_positions, k_positions = (
        filled(cls, **STRETCHED.get(cls.name, {})),
        torch.arange(4),
        torch.arange(-200_000, 4, 997),
    )
    q, k = drawn(4, 1), drawn(len(k_positions), 2)
    expected = scores(encoding, q, k, q_positions, k_positions)
    actual = scores(encoding.float(), q.float(), k.float(), q_positions, k_positions)
    assert ((actual - expected) / (1 + expected.abs())).abs().max() < 1e-5


@every
@pytest.mark.parametrize("by", [1, 1000, 100_000])
def test_scores_depend_on_distances_alone(cls: Any, by: int) -> None:
    encoding, q, k = filled(cls), drawn(4, 1), drawn(9, 2)
    q_positions, k_positions = torch.arange(4), torch.arange(-5, 4)
    assert (
        distance(
            scores(encoding, q, k, q_positions + by, k_positions + by),
            scores(encoding, q, k, q_positions, k_positions),
        )
        < 1e-9
    )


@every
def test_sinks_are_neither_rotated_nor_biased(cls: Any) -> None:
    encoding, q, sink, new = filled(cls), drawn(4, 1), drawn(2, 2), drawn(4, 3)
    positions, temperature = torch.arange(4), getattr(encoding, "temperature", 1.0)
    keys = [KeyValue(sink, sink, None), key_value(encoding, new, positions)]
    first, last = encode_positions(q, keys, positions, None, encoding)
    scaled = encoding.scale_queries(q, positions, torch.tensor(0))
    assert first.bias is None and first.v is sink and first.q.equal(scaled)
    assert first.k.equal(sink * temperature) and last.causal and not first.causal


@every
def test_gradients_are_right(cls: Any) -> None:
    encoding, k_positions = filled(cls, **STRETCHED.get(cls.name, {})), torch.arange(-2, 3)
    given = [
        drawn(3, 1)[:1, :, :1].requires_grad_(),
        drawn(5, 2)[:1, :, :1].requires_grad_(),
        *encoding.parameters(),
    ]
    assert torch.autograd.gradcheck(
        lambda q, k, *_: scores(encoding, q, k, k_positions[2:], k_positions), given
    )


@every
def test_low_precision_around_it_does_not_reach_its_angles_and_biases(cls: Any) -> None:
    encoding, q, k = (
        filled(cls, dtype=torch.float32),
        drawn(2, 1, torch.float32),
        drawn(2, 2, torch.float32),
    )
    q_positions = torch.tensor([131_071, 131_072])
    k_positions = q_positions - 5

    features = encoding.features(torch.zeros(2, 2, DIMS.d_model))

    def seen() -> list[Tensor]:
        keys = [KeyValue(k, k, k_positions, features=features)]
        biases = encoding.block_biases(q, keys, q_positions)
        return [
            *encoding.encode(q, k, q_positions, k_positions),
            *(bias.dense() for bias in biases if bias is not None),
        ]

    plain = seen()
    for low in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", low):
            assert all(a.equal(b) for a, b in zip(seen(), plain, strict=True))
    encoding.double()
    wide = encoding.encode(q.double(), k.double(), q_positions, k_positions)
    assert max(distance(a, b) for a, b in zip(plain[:2], wide, strict=True)) < 1e-5


@every
def test_it_compiles_as_one_graph(cls: Any) -> None:
    encoding, q, k, q_positions, k_positions = (
        filled(cls),
        drawn(3, 1),
        drawn(7, 2),
        torch.arange(3),
        torch.arange(-4, 3),
    )
    torch._dynamo.reset()
    compiled = torch.compile(partial(scores, encoding), backend="eager", fullgraph=True)
    assert compiled(q, k, q_positions, k_positions).equal(
        scores(encoding, q, k, q_positions, k_positions)
    )


@pytest.mark.slow  # generates and compiles C++
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("cls", [Rope, XPos])
def test_compiled_code_computes_a_table_once_for_all_rows_and_heads(cls: Any) -> None:
    from torch._inductor.utils import run_and_get_code  # slow to import

    torch._dynamo.reset()
    encoding, positions = cls(DIMS), torch.arange(5)
    compiled = torch.compile(encoding.rotate if cls is Rope else encoding.rotate_and_scale)
    x = torch.randn(3, 5, DIMS.n_heads, DIMS.d_head, requires_grad=True)
    powers = [] if cls is Rope else [positions.double()]
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, (code, *_) = run_and_get_code(compiled, x, positions, *powers)
    tables = re.findall(rf"empty_strided\w*\(\(5, 1, {DIMS.d_head // 2}\)", code)
    assert len(tables) >= 2, "cosines and sines are in memory, not in the loop over rows and heads"


@every_rotary
def test_a_token_without_distance_is_seen_as_it_is(cls: Any) -> None:
    encoding, q, k, positions = filled(cls), drawn(1, 1), drawn(1, 2), torch.tensor([77])
    scaled = encoding.scale_queries(q, positions, positions[0])
    plain = torch.einsum("bihd,bjhd->bhij", scaled, k) * getattr(encoding, "temperature", 1.0)
    assert distance(scores(encoding, q, k, positions, positions), plain) < 1e-12


# on CUDA it is compiled
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("cls", [cls for cls in FIXED if cls.has_bias], ids=lambda cls: cls.name)
def test_flex_attention_takes_the_same_biases(cls: Any) -> None:
    encoding, positions, past = (
        filled(cls, dtype=torch.float32),
        torch.arange(5),
        torch.arange(-6, 0),
    )
    segments = [KeyValue(drawn(2, 4).float(), drawn(2, 5).float(), None)]
    segments += [
        key_value(encoding, drawn(len(places), 6).float(), places) for places in (past, positions)
    ]
    with torch.no_grad():
        parts = encode_positions(drawn(5, 3).float(), segments, positions, None, encoding)
        assert distance(Flex(DIMS)(parts), Eager(DIMS)(parts)) < 1e-5


# ---------- in a run


RECIPE = (
    NANO
    + """
[positional]
use = "{use}"
[memory.xl]
use = "xl-cache"
length = 24
[optimizer]
use = "adamw"
lr = 5e-3
[schedule]
warmup_steps = 1
[tokenizer]
use = "bytes"
[train]
batch_size = 2
seq_len = 16
steps = 8
log_every = 1
[evaluate]
tokens = 64
batch_size = 2
[sample]
tokens = 4
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("use", ["alibi", "t5"])
def test_it_is_planned_and_trains(use: str, tmp_path: Path) -> None:
    tmp_path.joinpath("corpus").mkdir()
    tmp_path.joinpath("corpus", "text.txt").write_text(
        "It is a truth universally acknowledged. " * 200
    )
    tmp_path.joinpath("nano.toml").write_text(RECIPE.format(corpus="corpus", use=use))
    printed = []
    for command in (
        ["lswt_core", "plan", "nano.toml", "--json"],
        ["lswt_core.run", "nano.toml", "--out", "run"],
    ):
        done = run(*command, cwd=tmp_path, pictures=False, LSWT_CACHE_DIR=tmp_path / "cache")
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    assert (
        json.loads(printed[0])["parameters"]["by_component"].get(f"positional.{use}", 0)
        == {"alibi": 0, "t5": 32 * 2}[use]
    )
    losses = [
        json.loads(line)
        for line in tmp_path.joinpath("run", "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line["loss"] for line in losses if "loss" in line]
    assert len(steps) == 8 and steps[-1] < steps[0] - 0.1
