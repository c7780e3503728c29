"""Every way to the cross-entropy against torch's dense one, and the labels they draw."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import distance
from lswt_cross_entropy import Chunked, Dense
from lswt_liger import Liger
from lswt_tied import Tied
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lswt_core.interfaces import IGNORE, CrossEntropy, Dims, LabelSampling
from lswt_core.model.initialise import initialise
from lswt_core.plugin_api.cross_entropy import default_chunk_size, dense_cross_entropy
from lswt_core.plugin_api.lm_head import LMHead
from lswt_core.plugin_api.token_scores import (
    TokenScores,
    max_with_index,
    sample_labels,
    score_tile,
)

VOCAB, D_VOCAB, D_MODEL = 11, 5, 6


class Way(NamedTuple):
    """A component, the precision in which it computes and how far it may then be off: absolutely in
    float64, else relatively.
    """

    build: Callable[[], CrossEntropy]
    dtype: torch.dtype = torch.float64
    off: float = 1e-12

    def near(self, actual: Tensor | None, expected: Tensor) -> bool:
        """Whether numbers are the same."""
        assert actual is not None
        return distance(actual, expected) < self.off * (
            1 if self.dtype == torch.float64 else max(1.0, float(expected.detach().abs().max()))
        )

    def vocabulary(self, *, trainable: bool = True) -> LMHead:
        """A small table and its projections."""
        owner = vocabulary(self.dtype)
        owner.table.requires_grad_(trainable)
        return owner

    def states_and_labels(self, **options: Any) -> tuple[Tensor, Tensor]:
        """States and labels."""
        states, labels = states_and_labels(**options)
        return states.detach().to(self.dtype).requires_grad_(), labels


# 39 tokens: some divide them
CHUNKS = {f"chunks of {size}": Way(partial(Chunked, chunk=size)) for size in (1, 7, 13, 39, 0)}
WAYS = CHUNKS | {"dense": Way(Dense), "liger": Way(Liger, torch.float32, 1e-5)}
missing = pytest.mark.skipif(
    find_spec("liger_kernel") is None or find_spec("triton") is None,
    reason="liger-kernel is not installed",
)
every_way = pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, id=name, marks=missing if name == "liger" else ())
        for name, way in WAYS.items()
    ],
)


def dims_of(vocab_size: int = VOCAB) -> Dims:
    """The sizes of a small table and its projections."""
    return Dims(D_MODEL, 1, D_MODEL, 1, vocab_size=vocab_size, d_vocab=D_VOCAB)


def vocabulary(dtype: torch.dtype = torch.float64, size: int = VOCAB) -> LMHead:
    """A small table and its projections, with numbers."""
    head = Tied(dims_of(size))
    initialise(head, seed=0, std=0.8)
    return head.to(dtype)


def states_and_labels(
    rows: int = 3, length: int = 13, ignored: bool = True
) -> tuple[Tensor, Tensor]:
    """States [B, T, M] that want a gradient, and labels [B, T], some of them ignored."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(
        rows, length, D_MODEL, dtype=torch.float64, generator=generator
    ).requires_grad_()
    labels = torch.randint(VOCAB, (rows, length), generator=generator)
    return states, labels.masked_fill(
        torch.rand(rows, length, generator=generator) < 0.3, IGNORE
    ) if ignored else labels


def formula(owner: LMHead, states: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every token [B*T] by torch."""
    return cross_entropy(
        owner.logits(states).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )


def gradients(owner: LMHead, states: Tensor, total: Tensor, keep: bool = False) -> list[Tensor]:
    """Of the states, the output projection and, where it learns, the table."""
    expected = [
        states,
        owner.output.weight,
        *([owner.table.weight] if owner.table.weight.requires_grad else []),
    ]
    return list(torch.autograd.grad(total, expected, retain_graph=keep))


@every_way
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
def test_value_and_gradients_are_those_of_the_formula(
    way: Way, ignored: bool, trainable: bool
) -> None:
    owner, (states, labels) = (
        way.vocabulary(trainable=trainable),
        way.states_and_labels(ignored=ignored),
    )
    score, nll = owner.score(states, labels, by=way.build()), formula(owner, states, labels)
    assert score.nll is None or way.near(score.nll.flatten(), nll)
    assert way.near(score.total, nll.sum())
    assert int(score.correct) == int((owner.logits(states).argmax(-1) == labels).sum())
    for actual, expected in zip(
        gradients(owner, states, 0.37 * score.total),
        gradients(owner, states, 0.37 * nll.sum()),
        strict=True,
    ):
        assert way.near(actual, expected)


@every_way
def test_without_gradients_every_token_is_told(way: Way) -> None:
    owner, (states, labels) = way.vocabulary(), way.states_and_labels()
    with torch.no_grad():
        score = owner.score(states, labels, by=way.build())
    assert score.nll is not None and way.near(score.nll.flatten(), formula(owner, states, labels))


@every_way
def test_nothing_but_ignored_labels_is_no_loss(way: Way) -> None:
    owner, (states, labels) = way.vocabulary(), way.states_and_labels()
    draws = LabelSampling(torch.rand(labels.shape))
    score = owner.score(
        states, torch.full_like(labels, IGNORE), draws, by=way.build(), logsumexp=True
    )
    assert score.sampled is not None and score.logsumexp is not None
    assert not score.total.any()
    assert not score.correct.any()
    assert not score.sampled.any()
    assert not score.logsumexp.any()
    for total in (score.total, score.sampled, score.logsumexp.sum()):
        assert not any(gradient.any() for gradient in gradients(owner, states, total, keep=True))


@every_way
def test_bfloat16_states_are_scored_in_float32(way: Way) -> None:
    owner, (states, labels) = vocabulary(torch.float32), states_and_labels()
    with torch.autocast("cpu", torch.bfloat16):
        score = owner.score(states.float(), labels, by=way.build())
    assert score.total.dtype == torch.float32
    assert (
        distance(score.total, formula(owner, states.float(), labels).sum())
        < 0.01 * score.total.detach()
    )
    score.total.backward()
    assert owner.table.weight.grad is not None and owner.table.weight.grad.dtype == torch.float32


def test_without_gradients_none_is_computed() -> None:
    owner, (states, labels) = vocabulary(), states_and_labels()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        owner.score(states, labels)
    # the projection and the logits
    assert counted.get_total_flops() == 2 * labels.numel() * D_VOCAB * (D_MODEL + VOCAB)


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(
                    self.elements, tensor.untyped_storage().nbytes() // tensor.element_size()
                )
        return out


@pytest.mark.parametrize("sampled", [False, True])
def test_logits_of_all_tokens_never_exist(sampled: bool) -> None:
    owner, (states, labels) = vocabulary(size=100), states_and_labels(4, 50)
    way = Chunked(chunk=8)
    assert way.peak_logits("cpu", 4 * 50, owner.table.weight) == 8 * 100
    assert Dense().peak_logits("cpu", 4 * 50, owner.table.weight) == 4 * 50 * 100
    draws = (
        LabelSampling(torch.rand(4, 50), torch.tensor([True, False, True, True]))
        if sampled
        else None
    )
    with Largest() as largest:
        score = owner.score(states, labels, draws, by=way, logsumexp=True)
        assert score.logsumexp is not None
        total = score.total + score.logsumexp.square().sum()
        (total if score.sampled is None else total + score.sampled).backward()
    with Largest() as whole:
        formula(owner, states, labels).sum().backward()
    assert whole.elements == 4 * 50 * 100
    assert largest.elements <= max(8 * 100, 4 * 50 * D_MODEL)  # a chunk's logits, or the states


@pytest.mark.parametrize("words", [VOCAB, 1100])
@pytest.mark.parametrize("size", [13, 0])  # of 39 tokens: equal chunks, and a single one
def test_a_compiled_chunk_is_one_graph_and_finds_the_same(
    size: int, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced, not generated
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    owner, (states, labels) = vocabulary(size=words), states_and_labels()
    plain, fused, draws = (
        Chunked(chunk=size),
        Chunked(chunk=size),
        LabelSampling(torch.rand(labels.shape)),
    )
    fused.compile_kernels()
    expected, actual = (
        owner.score(states, labels, draws, by=by, logsumexp=True) for by in (plain, fused)
    )
    for field in ("total", "sampled", "logsumexp"):
        values = [getattr(score, field) for score in (actual, expected)]
        assert distance(*values) < 1e-12
        slopes = (gradients(owner, states, value.square().sum(), keep=True) for value in values)
        assert all(distance(a, b) < 1e-11 for a, b in zip(*slopes, strict=True))
    assert int(actual.correct) == int(expected.correct)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_compiled_chunk_scatters_nothing(soft_cap: float | None) -> None:
    """A scatter is a kernel of its own, whose input and output are in memory as float32."""
    torch._dynamo.reset()
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    compiled = torch.compile(score_tile, backend=aot_autograd(fw_compiler=record), fullgraph=True)
    logits, labels = torch.randn(5, 700), torch.tensor([3, IGNORE, 699, 0, 3])
    results = []
    for tile in (score_tile, compiled):
        overwritten = logits.clone()
        scores = TokenScores.allocate(logits, with_samples=False, capped=soft_cap is not None)
        tile(overwritten, labels, None, scores, True, soft_cap)
        results.append([overwritten, *(part for part in scores if part is not None)])
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    assert any("softmax" in target for target in seen)
    assert not any("scatter" in target for target in seen)


def test_chunks_are_long_where_a_tables_gradient_is_summed_in_memory() -> None:
    sizes = {
        (device, trained): default_chunk_size(device, trained=trained)
        for device in ("cpu", "cuda")
        for trained in (False, True)
    }
    assert sizes["cpu", False] < sizes["cpu", True] <= sizes["cuda", False] < sizes["cuda", True]


@pytest.mark.parametrize("size", [512, 1024, 1100])
def test_a_vocabulary_of_many_blocks_is_scored_as_by_the_formula(size: int) -> None:
    owner, (states, _) = vocabulary(size=size), states_and_labels()
    likeliest = owner.logits(states).argmax(-1)
    # every second one is right
    labels = likeliest.where(torch.arange(likeliest.shape[1]) % 2 == 0, size - 1)
    score, expected = (
        owner.score(states, labels, by=Chunked(chunk=5)),
        formula(owner, states, labels),
    )
    assert int(score.correct) == int((likeliest == labels).sum()) >= labels.numel() // 2
    assert score.nll is not None and distance(score.nll.flatten(), expected) < 1e-12
    pairs = zip(
        gradients(owner, states, score.total), gradients(owner, states, expected.sum()), strict=True
    )
    assert all(distance(a, b) < 1e-11 for a, b in pairs)


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1024, 1500])
def test_the_first_of_the_largest_is_found(size: int) -> None:
    for seed in range(30):
        # the largest is there many times
        rows = torch.randint(0, 9, (7, size), generator=torch.Generator().manual_seed(seed)).float()
        largest, place = max_with_index(rows)
        assert largest.equal(rows.amax(-1)) and place.equal(rows.argmax(-1))


def test_drawn_labels_follow_the_softmax() -> None:
    owner, draws = vocabulary(), 8000
    states, _ = states_and_labels(1, 1)
    many = states.detach().expand(1, draws, -1)
    uniforms = torch.rand(1, draws, generator=torch.Generator().manual_seed(2))
    labels = owner.score(
        many, torch.zeros(1, draws, dtype=torch.int64), LabelSampling(uniforms)
    ).drawn
    assert labels is not None
    expected = draws * owner.logits(states)[0, 0].softmax(-1)
    chi_square = ((labels.flatten().bincount(minlength=VOCAB) - expected).square() / expected).sum()
    assert expected.min() > 5
    # 99.9 % of a chi-square distribution with 10 degrees of freedom lie below
    assert chi_square < 29.59


SOME = torch.tensor([True, False, True])  # rows


@every_way
@pytest.mark.parametrize("rows", [None, SOME], ids=["all rows", "some rows"])
@pytest.mark.parametrize("trainable", [False, True])
def test_drawn_labels_depend_on_their_numbers_alone_and_bring_their_gradient(
    way: Way, rows: Tensor | None, trainable: bool
) -> None:
    owner, (states, labels) = way.vocabulary(trainable=trainable), way.states_and_labels()
    uniforms = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4))
    score = owner.score(states, labels, LabelSampling(uniforms, rows), by=way.build())
    kept = (
        labels if rows is None else labels.masked_fill(~rows[:, None], IGNORE)
    ).flatten() != IGNORE
    with torch.no_grad():
        cumulative = owner.logits(states).flatten(0, 1).softmax(-1).cumsum(-1)
        # how many ids lie below the number
        expected = (cumulative <= uniforms.flatten()[:, None]).sum(-1).masked_fill(~kept, IGNORE)
    assert score.sampled is not None
    assert score.drawn is not None
    assert score.drawn.flatten()[kept].equal(expected[kept])
    drawn = formula(owner, states, expected).sum()
    assert way.near(score.sampled, drawn)
    pairs = zip(
        gradients(owner, states, score.sampled, keep=True),
        gradients(owner, states, drawn),
        strict=True,
    )
    assert all(way.near(a, b) for a, b in pairs)
    # the data's labels are scored as if nothing was drawn
    data = formula(owner, states, labels).sum()
    assert way.near(score.total, data)
    pairs = zip(gradients(owner, states, score.total), gradients(owner, states, data), strict=True)
    assert all(way.near(a, b) for a, b in pairs)


@every_way
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "with both losses"])
def test_the_normaliser_has_its_own_gradient(way: Way, trainable: bool, together: bool) -> None:
    owner, (states, labels) = way.vocabulary(trainable=trainable), way.states_and_labels()
    uniforms = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4))
    score, kept = (
        owner.score(states, labels, LabelSampling(uniforms), by=way.build(), logsumexp=True),
        labels != IGNORE,
    )
    logsumexp = owner.logits(states).logsumexp(-1) * kept
    assert score.logsumexp is not None and way.near(score.logsumexp, logsumexp)
    assert score.sampled is not None and score.drawn is not None
    actual, expected = score.logsumexp.square().sum(), logsumexp.square().sum()
    if together:
        drawn = score.drawn.masked_fill(~kept, IGNORE)
        actual = actual + 0.3 * score.total + 0.7 * score.sampled
        expected = (
            expected
            + 0.3 * formula(owner, states, labels).sum()
            + 0.7 * formula(owner, states, drawn).sum()
        )
    pairs = zip(gradients(owner, states, actual), gradients(owner, states, expected), strict=True)
    assert all(way._replace(off=10 * way.off).near(a, b) for a, b in pairs)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_labels_without_probability_are_never_drawn(number: float) -> None:
    p = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    assert int(sample_labels(p, torch.tensor([number]))) == (1 if number == 0 else 2)


def test_the_dense_score_has_right_second_derivatives() -> None:
    owner, (states, labels) = vocabulary(), states_and_labels(1, 3)
    assert torch.autograd.gradgradcheck(
        lambda states: owner.score(states, labels, by=dense_cross_entropy).total, [states]
    )


def test_the_chunked_score_refuses_a_second_derivative() -> None:
    owner, (states, labels) = vocabulary(), states_and_labels()
    with pytest.raises(RuntimeError, match="`dense`"):
        torch.autograd.grad(owner.score(states, labels).total, states, create_graph=True)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_frozen_table_is_half_as_large_and_computes_as_its_rounded_numbers_do(
    precision: torch.dtype,
) -> None:
    frozen, wide = vocabulary(torch.float32), vocabulary(torch.float32)
    frozen.freeze()
    wide.table.weight.data = frozen.table.weight.float()
    wide.table.requires_grad_(False)
    states, labels = states_and_labels()
    ids, states = labels.clamp_min(0), states.detach().float().requires_grad_()
    uniforms = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4))
    assert frozen.table.weight.dtype == torch.float16 and not frozen.table.weight.requires_grad
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        for score in (
            lambda owner: owner.score(states, labels),
            lambda owner: owner.score(states, labels, LabelSampling(uniforms)),
            lambda owner: owner.score(states, labels, by=dense_cross_entropy),
        ):
            actual, expected = score(frozen), score(wide)
            assert actual.nll is not None
            assert expected.nll is not None
            assert actual.nll.equal(expected.nll)
            assert int(actual.correct) == int(expected.correct)
            assert all(
                a.equal(b)
                for a, b in zip(
                    gradients(frozen, states, actual.total),
                    gradients(wide, states, expected.total),
                    strict=True,
                )
            )
        assert frozen.embed(ids).equal(wide.embed(ids))
        assert frozen.logits(states).equal(wide.logits(states))
        assert frozen.embed(ids).dtype == precision
