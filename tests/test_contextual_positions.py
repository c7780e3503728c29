"""Positional encodings that look at inputs, keys or the number of tokens, against their papers'
formulas: alone, across segments, and where documents or windows hide keys.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    DIMS,
    attention_layer,
    context_of,
    distance,
    slow_unless,
    stream,
    tiny,
    tokens,
)
from lswt_blocked import Blocked
from lswt_compressed import Compressed
from lswt_cope import Cope
from lswt_eager import Eager
from lswt_forgetting import Forgetting
from lswt_nope import NoPosition
from lswt_registers import Registers
from lswt_rope import LogN, Rope, ScalableSoftmax
from lswt_sdpa import Sdpa
from lswt_sinks import SinkLogit
from lswt_xl_cache import SlidingWindow, XlCache, XlHidden
from position_parts import fill, filled
from runs import assert_resumes_to_the_bit, final, write_recipe
from torch import Tensor

from lswt_core.decode.rolling_kv_cache import inference_copy
from lswt_core.interfaces import Dims, KeyValue, Unsupported

MEMORIES: dict[str, Any] = {
    "xl-cache": partial(XlCache, length=64),
    "xl-hidden": partial(XlHidden, length=64),
    "window": partial(SlidingWindow, length=6),
    "compressed": partial(Compressed, length=64),
}
ENCODINGS: dict[str, Any] = {
    "forgetting": Forgetting,
    "cope": partial(Cope, positions=4),
    "log-n": partial(LogN, trained_length=7),
    "scalable-softmax": ScalableSoftmax,
}
GROUPED = DIMS._replace(n_heads=4, queries_per_kv=2)
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


def inputs(length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, DIMS.d_model, dtype=torch.float64, generator=generator)


def one_by_one(layer: Any, x: Tensor, positional: Any, dims: Dims, first: list[int]) -> Tensor:
    """A layer's output by the papers' formulas: for every query the list of keys from ``first`` on,
    gate by gate.
    """
    q, k, v = (
        part(x).unflatten(-1, (-1, dims.d_head)) for part in (layer.query, layer.key, layer.value)
    )
    if isinstance(positional, Rope):
        q, k = (positional.rotate(part, torch.arange(x.shape[1])) for part in (q, k))
    out = torch.zeros_like(q)
    for b, i, h in torch.cartesian_prod(*map(torch.arange, out.shape[:3])).tolist():
        kv = h // dims.queries_per_kv
        scores = []
        for j in range(first[i], i + 1):
            score = q[b, i, h] @ k[b, j, kv] / dims.d_head**0.5
            n = i - first[i] + 1
            match positional:
                case Forgetting():
                    gates = torch.sigmoid(x[b] @ positional.gate.weight.T + positional.gate.bias)
                    score = score + sum(math.log(gates[t, h]) for t in range(j + 1, i + 1))
                case Cope():
                    gates = [
                        torch.sigmoid(q[b, i, h] @ k[b, t, kv] / dims.d_head**0.5)
                        for t in range(j, i + 1)
                    ]
                    p = min(float(sum(gates)), len(positional.embeddings) - 1)
                    share, table = p - math.floor(p), positional.embeddings @ q[b, i, h]
                    score = score + share * table[math.ceil(p)]
                    score = score + (1 - share) * table[math.floor(p)]
                case LogN():
                    score = score * max(
                        positional.least, math.log(n) / math.log(positional.trained_length)
                    )
                case ScalableSoftmax():
                    score = score * positional.scale[h] * math.log(n)
            scores.append(score)
        weights = torch.stack(scores).softmax(0)
        out[b, i, h] = weights @ v[b, first[i] : i + 1, kv]
    return layer.output(out.flatten(2))


@every_encoding
@pytest.mark.parametrize("dims", [DIMS, GROUPED], ids=["heads", "grouped"])
@pytest.mark.parametrize("documents", [False, True])
@torch.no_grad()
def test_it_is_its_papers_formula(encoding: str, dims: Dims, documents: bool) -> None:
    positional, x = filled(ENCODINGS[encoding], dims), inputs()
    layer = attention_layer({"xl": partial(XlCache, length=16)}, dims=dims)
    first = [0, 0, 0, 3, 3, 3, 3, 7, 7] if documents else [0] * 9
    first_visible = torch.tensor([first]) if documents else None
    expected = one_by_one(layer, x, positional, dims, first)
    assert distance(layer(x, None, context_of(9, positional, first_visible)).x, expected) < 1e-12
    outputs, state = [], None
    for start, stop in ((0, 2), (2, 3), (3, 9)):
        borders = None if first_visible is None else first_visible[:, start:stop] - start
        context = context_of(stop - start, positional, borders)
        out = layer(x[:, start:stop], state, context)
        state = out.state
        outputs.append(out.x)
    assert distance(torch.cat(outputs, 1), expected) < 1e-12


@every_encoding
@pytest.mark.parametrize("memory", MEMORIES)
def test_a_text_means_the_same_however_it_is_cut(encoding: str, memory: str) -> None:
    """With memories of every kind, sinks, and documents that begin within segments."""
    memories = {"xl": MEMORIES[memory], "sink": SinkLogit, "r": partial(Registers, count=2)}
    decoder, fused = (
        tiny(positional=ENCODINGS[encoding], memories=memories, attention=backend, dims=GROUPED)
        for backend in (Eager, Sdpa)
    )
    for model in (decoder, fused):
        fill(model.positional)
    ids, first_visible = tokens(2, 20), torch.tensor([[0] * 5 + [5] * 8 + [13] * 7, [0] * 20])
    for borders in (None, first_visible):
        whole = decoder(ids, None, borders)[0]
        assert max(distance(stream(decoder, ids, n, borders), whole) for n in (1, 6)) < 1e-12
        assert distance(stream(fused, ids, 6, borders), whole) < 1e-12
    alone = decoder(ids[:1, 5:13])[0]
    assert distance(decoder(ids, None, first_visible)[0][:1, 5:13], alone) < 1e-12


@pytest.mark.parametrize(
    ("encoding", "plain"),
    [
        (partial(LogN, trained_length=30, least=1.0), Rope),
        (partial(Cope, positions=4), NoPosition),  # embeddings start at 0
    ],
    ids=["log-n", "cope"],
)
def test_it_is_another_encoding_where_it_does_nothing(encoding: Any, plain: Any) -> None:
    memories = {"xl": MEMORIES["xl-cache"]}
    models = [tiny(positional=one, memories=memories) for one in (encoding, plain)]
    hidden, expected = (stream(model, tokens(2, 20), 7) for model in models)
    assert distance(hidden, expected) < 1e-12


def test_a_gate_that_is_open_forgets_nothing() -> None:
    models = [tiny(positional=one) for one in (Forgetting, NoPosition)]
    with torch.no_grad():
        models[0].positional.gate.weight.zero_()
        models[0].positional.gate.bias.fill_(100.0)  # type: ignore[operator]
    hidden, expected = (model(tokens(2, 20))[0] for model in models)
    assert distance(hidden, expected) < 1e-12


@every_encoding
def test_gradients_are_right(encoding: str) -> None:
    layer = attention_layer({"xl": partial(XlCache, length=16)})
    positional = filled(ENCODINGS[encoding])
    state = layer(inputs(3), None, context_of(3, positional)).state

    def out(x: Tensor, *_: Tensor) -> Tensor:
        return layer(x, state, context_of(4, positional)).x  # type: ignore[no-any-return]

    given = (inputs(4).requires_grad_(), *positional.parameters())
    assert torch.autograd.gradcheck(out, given, fast_mode=True)


def test_log_n_keeps_the_fast_path_of_decoding_and_the_others_do_not() -> None:
    memories = {"xl": MEMORIES["xl-cache"]}
    kept = {
        name: inference_copy(tiny(positional=cls, memories=memories), torch.float64)[1] is not None
        for name, cls in ENCODINGS.items()
    }
    assert kept == {"forgetting": False, "cope": False, "log-n": True, "scalable-softmax": True}


def test_memories_that_keep_no_gates_are_refused() -> None:
    k = torch.zeros(1, 3, 2, 8)
    with pytest.raises(Unsupported, match="xl-cache"):
        Forgetting(DIMS).block_biases(k, [KeyValue(k, k, torch.arange(3))], torch.arange(3))
    with pytest.raises(Unsupported, match="biases"):
        tiny(positional=Forgetting, attention=Blocked)(tokens(1, 9))


@pytest.mark.parametrize("use", slow_unless(["forgetting"], ENCODINGS))
def test_a_resumed_run_ends_with_the_same_bits(
    use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer with gates, embeddings or factors of its own, grouped heads, documents apart."""
    recipe = write_recipe(tmp_path)
    options = (
        "optimizer.use=adamw",
        "optimizer.lr=2e-3",
        "positional.use=none",
        f'layers."every 1".positional.use={use}',
        "model.n_kv_heads=1",
        "train.document_masking=true",
        "train.steps=2",
        "checkpoint.every=1",
        "evaluate.every=2",
    )
    run = assert_resumes_to_the_bit(monkeypatch, recipe, *options)
    kept = {name.rpartition(".")[2] for name in final(run) if name.startswith("memory/")}
    assert ("features" in kept) == (use == "forgetting")
