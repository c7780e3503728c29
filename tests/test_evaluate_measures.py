"""What ``evaluate`` says of a text, number by number, against code of a few lines in float64."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data_parts import END
from evaluation_parts import MEMORY, SEQ_LEN, XL, evaluate, make_run, model_of, text_of
from helpers import DIMS, VOCAB, tokens
from lswt_bytes import Bytes
from lswt_nope import NoPosition
from lswt_registers import Registers
from lswt_xl_cache import XlCache
from mutants.memories import ShowsTheFuture
from torch import Tensor
from torch.nn import functional as F

from lswt_core.ablation.runs.context_probe import probe_context
from lswt_core.cli.scaffold.examples.data import Example as ExampleSource
from lswt_core.data import tokenise
from lswt_core.decode.load_run import LoadedModel
from lswt_core.evaluation import plots
from lswt_core.evaluation.activations import measure_activations
from lswt_core.evaluation.attention_sinks import attention_sinks
from lswt_core.evaluation.effective_context import relative_lengths
from lswt_core.evaluation.extrapolation import extrapolation
from lswt_core.evaluation.measure import Asked, evaluate_text
from lswt_core.evaluation.narrow_states import narrow_errors
from lswt_core.evaluation.plain_data import FACTORS, WINDOWS
from lswt_core.evaluation.repetition import measure_repetition
from lswt_core.evaluation.texts import Text, labels_of
from lswt_core.evaluation.token_losses import token_losses
from lswt_core.interfaces import (
    IGNORE,
    KVBlock,
)
from lswt_core.model.decoder import Decoder

Carry = Callable[[Any], Any]


def keep(state: Any) -> Any:
    """The state as it is."""
    return state


def forget(state: Any) -> None:
    """No state."""


@torch.no_grad()
def logits_of(
    model: LoadedModel, ids: np.ndarray, size: int = SEQ_LEN, carry: Carry = keep
) -> Tensor:
    """Logits [T, V] of a document [T] read in segments of ``size`` tokens."""
    state, parts = None, []
    for segment in torch.from_numpy(ids)[None].split(size, dim=1):
        states, state = model.decoder(segment, state)
        state = carry(state)
        parts.append(model.decoder.vocabulary.logits(states)[0])
    return torch.cat(parts)


def losses_of(
    model: LoadedModel,
    ids: np.ndarray,
    labels: np.ndarray,
    size: int = SEQ_LEN,
    carry: Carry = keep,
) -> np.ndarray:
    """Losses [scored tokens] of a document [T]."""
    asked = torch.from_numpy(labels)
    losses = F.cross_entropy(logits_of(model, ids, size, carry), asked, reduction="none")
    return losses[asked != IGNORE].numpy()


def over_documents(text: Text, losses: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Any:
    """``losses`` of every document's ids and labels, one after the other."""
    return np.concatenate(list(map(losses, text.documents, text.labels)))


def answers_of(model: LoadedModel, text: Text) -> Text:
    """A text whose scored tokens, all behind the first segment, are the model's own predictions."""
    for ids, labels in zip(text.documents, text.labels, strict=True):
        labels[:SEQ_LEN] = IGNORE
        labels[SEQ_LEN:] = logits_of(model, ids).argmax(-1)[SEQ_LEN:]
    return text


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """A model that is sure of what it predicts, with a KV cache of MEMORY tokens."""
    return model_of(memories=XL, std=1.0)


@pytest.fixture(scope="module")
def text(model: LoadedModel) -> Text:
    """What the model predicts with its memory, of six documents."""
    return answers_of(model, text_of(9, 14, 17, 22, 35, 40))


@pytest.fixture(scope="module")
def report(model: LoadedModel, text: Text) -> dict[str, Any]:
    """All measures of the model on the text."""
    return evaluate_text(model, text, Asked(SEQ_LEN, memory=[2], contexts=[4, 8, 12]))


@pytest.fixture(scope="module")
def full(model: LoadedModel, text: Text) -> np.ndarray:
    """Losses with the memory."""
    return over_documents(text, partial(losses_of, model))


@pytest.fixture(scope="module")
def short(model: LoadedModel, text: Text) -> np.ndarray:
    """Losses without memory."""
    return over_documents(text, partial(losses_of, model, carry=forget))


# ---------- numbers of a text


def test_perplexity_is_the_exponential_of_the_loss(
    report: dict[str, Any], full: np.ndarray
) -> None:
    assert report["loss"]["value"] == pytest.approx(full.mean(), abs=1e-12)
    assert report["perplexity"] == pytest.approx(np.exp(full.mean()), rel=1e-12)


def test_losses_by_position_are_those_of_the_tokens_there(
    report: dict[str, Any], text: Text, full: np.ndarray
) -> None:
    places = np.concatenate([np.arange(SEQ_LEN, len(ids)) for ids in text.documents])
    expected = {}
    for first, end in ((4, 8), (8, 16), (16, 32), (32, 64)):
        of_bucket = full[(places >= first) & (places < end)]
        expected[first] = (len(of_bucket), of_bucket.mean())
    found = {one["from"]: (one["tokens"], one["value"]) for one in report["by_position"]}
    assert found.keys() == expected.keys()
    assert len({round(loss, 4) for _, loss in expected.values()}) == 4, "they can be told apart"
    for first, one in expected.items():
        assert found[first] == pytest.approx(one, abs=1e-12)


def test_key_tokens_are_those_that_the_memory_decides(
    report: dict[str, Any], full: np.ndarray, short: np.ndarray
) -> None:
    key = (short - full > 2) & (full < 2)
    assert 0 < key.sum() < ((short - full > 2) | (full < 2)).sum()
    assert report["key_tokens"]["tokens"] == key.sum()
    assert report["key_tokens"]["share"] == pytest.approx(key.mean())
    assert report["key_tokens"]["perplexity"] == pytest.approx(np.exp(full[key].mean()))
    assert report["key_tokens"]["short_perplexity"] == pytest.approx(np.exp(short[key].mean()))


LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}  # that a head's largest number becomes


def through(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values [B, N, H, D] after they were kept in another type."""
    if dtype not in LARGEST:
        return tensor.to(dtype).double()
    scale = tensor.abs().amax((1, 3), keepdim=True) / LARGEST[dtype]
    scaled = tensor / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype).double() * scale


def narrow_carry(dtype: torch.dtype) -> Carry:
    """What is left of a decoder's state that was kept in another type."""

    def carry(state: Any) -> Any:
        layers = [layer["xl"] for layer in state]
        return [{"xl": {name: through(t, dtype) for name, t in xl.items()}} for xl in layers]

    return carry


def test_narrow_caches_change_the_loss_by_what_they_round(
    model: LoadedModel, text: Text, report: dict[str, Any], full: np.ndarray
) -> None:
    types = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn, "int8": torch.int8}
    found = {one["dtype"]: one for one in report["narrow_memory"]}
    assert found.keys() == types.keys()
    for name, dtype in types.items():
        carry = narrow_carry(dtype)
        change = over_documents(text, partial(losses_of, model, carry=carry)) - full
        assert abs(change.mean()) > 1e-4
        assert found[name]["increase"]["value"] == pytest.approx(change.mean(), abs=1e-9)
        assert found[name]["largest"] == pytest.approx(abs(change).max(), abs=1e-9)


def test_the_largest_change_of_a_loss_may_be_a_decrease(model: LoadedModel, text: Text) -> None:
    losses = token_losses(model, text, SEQ_LEN)
    above = losses._replace(nll=losses.nll + 9)
    for one in narrow_errors(model, text, SEQ_LEN, above):
        assert one.increase.value < 0 and one.largest > 8.9


# ---------- contexts


@pytest.mark.parametrize(("gain", "recl"), [(0.009, 10), (0.011, 20)])
def test_a_context_is_effective_if_it_gains_a_hundredth_of_perplexity(
    gain: float, recl: int
) -> None:
    short = np.array([5.0, 3.0, 1.0, 2.0])
    losses = np.stack([short, short + np.log1p(-gain)])
    [lengths] = relative_lengths([10, 20], [losses])
    assert lengths == dict.fromkeys((0.1, 0.5, 1.0), recl)


def test_windows_are_read_in_segments_with_the_state_and_in_one_pass(
    model: LoadedModel, text: Text
) -> None:
    measured = extrapolation(model, text, FACTORS, WINDOWS)
    contexts = [point.context for point in measured.points]
    assert contexts == [4, 8, 16, 32]
    # all of a document behind its first segment is scored: the first end of a window of 32
    windows = [
        (ids[:32], labels[:32])
        for ids, labels in zip(text.documents, text.labels, strict=True)
        if len(ids) >= 32
    ]
    assert measured.windows == len(windows) == 2
    for point in measured.points:
        ends = [(ids[-point.context :], labels[-point.context :]) for ids, labels in windows]

        def mean(**how: Any) -> float:
            losses = [losses_of(model, *end, **how)[-2:] for end in ends]  # noqa: B023
            return float(np.concatenate(losses).mean())

        recomputed, streamed = mean(size=point.context), mean()
        assert point.recomputed.value == pytest.approx(recomputed, abs=1e-12)
        assert point.streamed.value == pytest.approx(streamed, abs=1e-12)
        if point.context > SEQ_LEN + MEMORY:
            assert len({recomputed, streamed, mean(carry=forget)}) == 3, "they can be told apart"


# ---------- attention and hidden states


@torch.no_grad()
def mean_attention(blocks: list[KVBlock]) -> tuple[Tensor, Tensor]:
    """Each head's mean attention [H] to the first token and to registers, over queries behind the
    first, by its definition.
    """
    scores = []
    for block in blocks:
        product = torch.einsum("bthd,bnhd->bhtn", block.q, block.k) / block.q.shape[-1] ** 0.5
        if block.causal:
            ahead = torch.ones(product.shape[-2:]).triu(1).bool()
            product = product.masked_fill(ahead, -torch.inf)
        scores.append(product)
    sizes = [block.k.shape[1] for block in blocks]
    parts = torch.cat(scores, -1).exp()
    parts = parts / parts.sum(-1, keepdim=True)
    shares = parts[:, :, 1:].mean((0, 2)).split(sizes, -1)
    own = [share for share, block in zip(shares, blocks, strict=True) if block.causal]
    others = [share for share, block in zip(shares, blocks, strict=True) if not block.causal]
    return own[0][:, 0], others[0].sum(-1)


@torch.no_grad()
def lean(decoder: Decoder, ids: Tensor) -> None:
    """Let the queries of the first head of some layers lean towards the first token's key, and
    those of the second head of one, whose tokens have no keys, towards the register's.
    """
    for layer, block in enumerate(decoder.blocks):
        with recorded_attention(decoder) as calls:
            decoder(ids)
        register, own = calls[layer]
        attention: Any = block.attention
        first, second = attention.query.bias.view(2, -1)
        if layer < 3:
            first += 3 * own.k[0, 0, 0]
        if layer == 1:
            second += 9 * register.k[0, 0, 1]
            attention.key.weight[len(first) :] = 0
            attention.key.bias[len(first) :] = 0


@contextmanager
def recorded_attention(decoder: Decoder) -> Iterator[list[list[KVBlock]]]:
    """The blocks that the attention of every layer gets."""
    calls: list[list[KVBlock]] = []

    def record(_: Any, arguments: Any) -> None:
        calls.append(arguments[0])

    attentions: list[Any] = [block.attention for block in decoder.blocks]
    hooks = [one.backend.register_forward_pre_hook(record) for one in attentions]
    yield calls
    for hook in hooks:
        hook.remove()


def test_sink_rates_count_heads_by_their_mean_attention() -> None:
    model = model_of(
        dims=DIMS._replace(n_layers=4),
        memories={"registers": partial(Registers, count=1)},
        positional=NoPosition,
    )
    ids = F.pad(tokens(3, 11), (1, 0), value=2)
    lean(model.decoder, ids)
    with recorded_attention(model.decoder) as calls, torch.no_grad():
        model.decoder(ids)
    heads = [mean_attention(blocks) for blocks in calls]
    found = attention_sinks(model, ids)
    for name, layers in zip(("first_token", "registers"), zip(*heads, strict=True), strict=True):
        shares = torch.cat(layers)
        above = int((shares > 0.3).sum())
        assert above == {"first_token": 2, "registers": 1}[name] and shares.numel() == 8
        assert ((shares > 0.03) & (shares < 0.3)).any()
        assert found[name].mean == pytest.approx(float(shares.mean()), abs=1e-12)
        assert found[name].rate == above / 8


def hidden_states(model: LoadedModel, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states after every block [layers, B, T, M], and after the output norm [B, T, M]."""
    states: list[np.ndarray] = []
    decoder = model.decoder
    hooks = [
        block.register_forward_hook(lambda _, arguments, out: states.append(out.x.numpy()))
        for block in decoder.blocks
    ]
    with torch.no_grad():
        final = decoder(ids)[0].numpy()
    for hook in hooks:
        hook.remove()
    return np.stack(states), final


def mean_cosine(states: np.ndarray) -> float:
    """The mean cosine similarity of two tokens of a row, of states [B, T, M]."""
    cosines = []
    for row in states / np.linalg.norm(states, axis=-1, keepdims=True):
        cosines += [a @ b for i, a in enumerate(row) for j, b in enumerate(row) if i != j]
    return float(np.mean(cosines))


def assert_activations(model: LoadedModel, ids: Tensor, massive: int) -> None:
    """What is measured is what hooks see, and so many activations are massive."""
    states, final = hidden_states(model, ids)
    centred = states - states.mean(-1, keepdims=True)
    kurtosis = (centred**4).mean(-1) / (centred**2).mean(-1) ** 2
    found = measure_activations(model, ids)
    assert found.largest == pytest.approx(abs(states).max(), rel=1e-5)
    # the lower of the two numbers in the middle, as torch defines the median
    middle = [np.sort(abs(layer), axis=None)[(layer.size - 1) // 2] for layer in states]
    ratios = [abs(layer).max() / median for layer, median in zip(states, middle, strict=True)]
    assert found.largest_over_median == pytest.approx(max(ratios), rel=1e-5)
    assert found.kurtosis == pytest.approx(kurtosis.mean(), rel=1e-4)
    assert found.isotropy == pytest.approx(1 - mean_cosine(final), abs=1e-5)
    assert found.massive == massive


def test_hidden_states_are_measured_after_every_block(model: LoadedModel) -> None:
    assert_activations(model, tokens(3, SEQ_LEN), massive=0)


@pytest.mark.parametrize(
    ("scale", "planted", "is_massive"),
    [
        (1.0, 2000.0, True),
        (1.0, 300.0, False),  # above 100, but not 1,000 times the median
        (0.01, 90.0, False),  # the other way round
        (0.01, 110.0, True),
    ],
)
def test_a_planted_activation_is_massive_if_it_is_large_and_times_the_median(
    scale: float, planted: float, is_massive: bool
) -> None:
    """Blocks that add nothing, but for the second, which adds a number to one channel."""
    model = model_of(memories={}, dims=DIMS._replace(n_layers=3))
    ids, decoder = tokens(3, SEQ_LEN), model.decoder
    with torch.no_grad():
        for parameter in decoder.blocks.parameters():
            parameter.zero_()
        decoder.input_norm.norm.weight.fill_(scale)
        decoder.blocks[1].ffn.fc2.bias[5] = -planted
    assert_activations(model, ids, massive=2 * ids.numel() * is_massive)


def repeated(rows: Sequence[Sequence[int]], n: int) -> float:
    """The mean share of n-grams that came before in their row."""
    shares = []
    for row in rows:
        grams = list(zip(*(row[i:] for i in range(n)), strict=False))
        shares.append(np.mean([gram in grams[:i] for i, gram in enumerate(grams)]))
    return float(np.mean(shares))


@torch.no_grad()
def continued(model: LoadedModel, start: np.ndarray, count: int, sign: int = 1) -> list[int]:
    """The ``count`` most likely next ids of a text (the least likely: ``sign`` -1), its beginning
    read in segments.
    """
    state, written = None, list[int]()
    for segment in torch.from_numpy(start)[None].split(SEQ_LEN, dim=1):
        states, state = model.decoder(segment, state)
    for _ in range(count):
        logits = model.decoder.vocabulary.logits(states[:, -1])
        written.append(int((sign * logits).argmax()))
        states, state = model.decoder(torch.tensor([[written[-1]]]), state)
    return written


def test_repetition_is_that_of_greedy_continuations() -> None:
    model, text = model_of(memories=XL, seed=2), text_of(9, 3, 7)
    measured = measure_repetition(model, text, prompt=5, tokens=20, continuations=4)
    starts = [ids[:5] for ids in text.documents if len(ids) >= 5]
    greedy = [continued(model, start, 20) for start in starts]
    others = [continued(model, start, 20, sign=-1) for start in starts]
    assert measured.repeated == pytest.approx({n: repeated(greedy, n) for n in (2, 3, 4)})
    assert measured.repeated != pytest.approx({n: repeated(others, n) for n in (2, 3, 4)}, abs=0.1)
    shares = [1 - repeated(greedy, n) for n in (2, 3, 4)]
    assert measured.diversity == pytest.approx(np.prod(shares))


# ---------- the picture


def test_every_panel_draws_the_numbers_that_its_axes_name(
    report: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plots, "render_png", lambda figure: figures.append(figure) or b"")
    plots.plot_evaluation({"model": "m", "texts": {"a": report}})
    memory, contexts = report["memory"], report["effective_context"]["losses"]
    by_position, by_place = memory[-1]["by_position"], report["by_position"]
    expected = {
        "memory (tokens)": ([0, 2], [point["gain"] for point in memory[:2]]),
        "position in the segment, from": ([0, 1, 2], by_position),
        "context, cold restarts (tokens)": ([4, 8, 12], [one["over_longest"] for one in contexts]),
        "tokens since the document's start, from": ([4, 8, 16, 32], by_place),
    }
    [figure] = figures
    assert [axes.get_xlabel() for axes in figure.axes] == list(expected)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "gain over no memory (nats)",
        "gain over no memory (nats)",
        "loss over the longest's (nats)",
        "loss (nats per token)",
    ]
    for axes, (at, points) in zip(figure.axes, expected.values(), strict=True):
        [line] = axes.lines
        assert [*line.get_xdata()] == at
        assert [*line.get_ydata()] == [one["value"] for one in points]
        if all(one["interval"] for one in points):
            [band] = axes.collections
            drawn = band.get_paths()[0].vertices[:, 1]
            assert {*drawn} == {bound for one in points for bound in one["interval"]}


# ---------- texts


def test_a_written_source_predicts_what_follows_its_prompt(tmp_path: Path) -> None:
    for name, content in (("a", "one\ntwo\nthree\nfour\n"), ("b", "one\ntwo"), ("c", "é\n\nü")):
        tmp_path.joinpath(f"{name}.txt").write_text(content, encoding="utf-8")
    options = {"directory": str(tmp_path), "pattern": "*.txt", "held_out": 3}
    source = ExampleSource(**options, prompt_lines=2)
    assert source.selects_scored and not ExampleSource(**options).selects_scored
    documents = [*source.documents("valid"), *source.documents("train")]
    assert [one.id for one in documents] == ["a.txt", "b.txt", "c.txt"]
    for one, predicted in zip(documents, ("three\nfour\n", "", "ü"), strict=True):
        [(begin, end)] = one.scored or ()
        assert one.text[begin:end] == predicted and end == len(one.text) + 1
    held_out = tokenise(source, Bytes(), "valid", tmp_path / "cache")
    labels = labels_of(np.asarray(held_out.ids), END)
    assert [*labels] == [IGNORE] * len("one\ntwo\n") + [*b"three\nfour\n", END]


# ---------- a memory that shows the future


@pytest.mark.parametrize(("memory", "about"), [(XlCache, []), (ShowsTheFuture, ["causality"])])
def test_a_memory_that_shows_the_future_is_not_causal(memory: type, about: list[str]) -> None:
    """So says a run of itself; the conformance kit says it of the component."""
    model = model_of(memories={"xl": partial(memory, length=MEMORY)})
    tokenizer: Any = SimpleNamespace(vocab_size=VOCAB)
    flaws = probe_context(model._replace(tokenizer=tokenizer), torch.device("cpu"))
    assert [flaw.about for flaw in flaws] == about


# ---------- the command


def test_without_matplotlib_all_but_the_picture_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out, text = make_run(tmp_path), tmp_path / "e", tmp_path / "short.txt"
    text.write_text("sense and sensibility")
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    capsys.readouterr()
    code, printed, _ = evaluate(capsys, run, "--text", f"a={text}", "--out", out, "--json")
    assert code == 0
    names = {"evaluation.json", "evaluation.md", "evaluation.html"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(printed)
    for name in names - {"evaluation.json"}:
        written = (out / name).read_text()
        assert "a: Memory gain by position" in written and ".png" not in written
