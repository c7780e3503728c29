"""The measures of ``evaluate`` against independent code of a few lines, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from evaluation_parts import (
    EOS,
    MEMORY,
    SEQ_LEN,
    XL,
    evaluate,
    make_run,
    model_of,
    padded,
    text_of,
)
from helpers import stream, tiny, tokens
from lswt_recall.integers import Integers
from lswt_registers import Registers
from lswt_rope import Rope
from lswt_xl_cache import XlCache, XlHidden
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from lswt_core import Registry
from lswt_core.ablation import probe_runs
from lswt_core.ablation.probe_runs import ProbedRuns, require_probes
from lswt_core.ablation.report.probes import compare_probes
from lswt_core.ablation.runs.outcome import ArmResult, Outcome
from lswt_core.decode.load_run import LoadedModel, load_run
from lswt_core.errors import UsageError
from lswt_core.evaluation.attention_sinks import attention_sinks
from lswt_core.evaluation.effective_context import (
    Targets,
    choose_contexts,
    cold_losses,
    measure_context,
    relative_length,
)
from lswt_core.evaluation.extrapolation import extrapolation
from lswt_core.evaluation.intervals import mean_over_tokens
from lswt_core.evaluation.key_tokens import key_tokens
from lswt_core.evaluation.measure import Asked, evaluate_text
from lswt_core.evaluation.memory_gain import memory_gain
from lswt_core.evaluation.narrow_states import narrow_errors
from lswt_core.evaluation.plots import draw_recall
from lswt_core.evaluation.probe_batch import probe_batch
from lswt_core.evaluation.probes import PROBES
from lswt_core.evaluation.recall import chance_level, recall_by_distance
from lswt_core.evaluation.register_gain import register_gain
from lswt_core.evaluation.repetition import measure_repetition, repeated_share
from lswt_core.evaluation.report import describe_recl, render_text
from lswt_core.evaluation.segment_dependence import segment_dependence
from lswt_core.evaluation.texts import Limits, Text, Whole, choose_documents, limits_for
from lswt_core.evaluation.token_losses import TokenLosses, token_losses
from lswt_core.interfaces import IGNORE, KeyValue, KVProjection, State
from lswt_core.plugin_api.pytree import tree_map


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """A model with a KV cache of MEMORY tokens."""
    return model_of(memories=XL)


def printed(text: dict[str, Any]) -> str:
    """What the command prints of the text "a", in words a space apart."""
    report = {
        "seq_len": SEQ_LEN,
        "trained_seq_len": SEQ_LEN,
        "precision": "float64",
        "texts": {"a": text},
        "tasks": {},
    }
    return " ".join(render_text(report).split())


def losses_of(model: LoadedModel, ids: np.ndarray, states: Tensor) -> np.ndarray:
    """Losses [tokens] of a document's labels, from its states [tokens, M]."""
    labels = torch.tensor([*ids[1:], EOS])
    with torch.no_grad():
        logits = model.decoder.vocabulary.logits(states)
    return F.cross_entropy(logits, labels, reduction="none").numpy()


def test_losses_are_those_of_each_document_read_alone(model: LoadedModel) -> None:
    text = text_of(3, 17, 8, 1)
    got = token_losses(model, text, SEQ_LEN)
    alone = []
    for ids in text.documents:
        with torch.no_grad():
            states = stream(model.decoder, padded(ids), SEQ_LEN)[0, : len(ids)]
        alone.append(losses_of(model, ids, states))
    np.testing.assert_allclose(got.nll, np.concatenate(alone), atol=1e-10)
    assert got.position.tolist() == [*range(3), *range(17), *range(8), 0]
    assert got.document.tolist() == [0] * 3 + [1] * 17 + [2] * 8 + [3]


@pytest.mark.parametrize("memory", [XlCache, XlHidden])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_a_cut_memory_is_a_model_that_was_built_with_it(memory: type, length: int) -> None:
    text = text_of(3, 17, 8)
    points = memory_gain(
        model_of(memories={"xl": partial(memory, length=MEMORY)}), text, SEQ_LEN, [length]
    )
    built = model_of(memories={"xl": partial(memory, length=length)})
    whole = token_losses(built, text, SEQ_LEN)
    none = token_losses(model_of(memories={}), text, SEQ_LEN)
    behind = whole.position >= SEQ_LEN
    assert [point.memory for point in points] == [0, length, None]
    assert points[1].loss.value == pytest.approx(whole.mean, abs=1e-12)
    expected = (none.nll - whole.nll)[behind].mean()
    assert points[1].gain.value == pytest.approx(expected, abs=1e-12)
    assert points[1].gain.tokens == behind.sum() == 13 + 4
    firsts = behind & (whole.position % SEQ_LEN == 0)
    assert points[1].by_position[0][0] == 0
    assert points[1].by_position[0][1].value == pytest.approx((none.nll - whole.nll)[firsts].mean())


class NeverRead(XlCache):
    """A memory that keeps keys and shows none of them."""

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        blocks, state = super().forward(x, positions, state, project)
        return blocks[-1:], state


class OneLate(XlCache):
    """A memory that hides the last token before the segment."""

    def forward(
        self, x: Tensor, positions: Tensor, state: State, project: KVProjection
    ) -> tuple[list[KeyValue], State]:
        blocks, state = super().forward(x, positions, state, project)
        *cached, own = blocks
        late = [
            b._replace(k=b.k[:, :-1], v=b.v[:, :-1], positions=b.positions[:-1]) for b in cached
        ]
        return [*late, own], state


def test_a_memory_that_is_never_read_gains_nothing() -> None:
    unread = model_of(memories={"xl": partial(NeverRead, length=MEMORY)})
    points = memory_gain(unread, text_of(20, 9), SEQ_LEN, [2])
    assert [point.gain.value for point in points] == [0.0, 0.0, 0.0]


def test_a_memory_that_is_read_one_token_late_gains_nothing_from_one_token() -> None:
    late = model_of(memories={"xl": partial(OneLate, length=MEMORY)})
    points = memory_gain(late, text_of(20, 9), SEQ_LEN, [1, 2])
    assert points[1].gain.value == 0.0
    assert points[2].gain.value != 0.0


@pytest.mark.parametrize(
    ("parts", "lengths", "sizes", "why"),
    [
        ({"memories": {}}, [], (20,), "no layer"),
        ({"memories": XL}, [17], (20,), "at most 16"),
        ({"memories": XL}, [], (4, 2), "first segment"),
    ],
)
def test_memories_that_cannot_be_measured_are_refused(
    parts: dict[str, Any], lengths: Sequence[int], sizes: Sequence[int], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        memory_gain(model_of(**parts), text_of(*sizes), SEQ_LEN, lengths)


def test_cold_restarts_see_exactly_so_many_tokens(model: LoadedModel) -> None:
    text, targets = text_of(20, 15), Targets(np.array([0, 1, 0]), np.array([19, 14, 11]))
    for context in (1, 3, 4, 7):
        got = cold_losses(model, text, targets, context)
        for loss, document, position in zip(got, targets.document, targets.position, strict=True):
            window = torch.from_numpy(text.documents[document][: position + 1][None, -context:])
            first = (context - 1) % SEQ_LEN + 1
            with torch.no_grad():
                states, state = model.decoder(window[:, :first])
                if context > first:
                    states, _ = model.decoder(window[:, first:], state)
            label = torch.tensor([text.labels[document][position]])
            logits = model.decoder.vocabulary.logits(states[:, -1])
            assert loss == pytest.approx(F.cross_entropy(logits, label).item(), abs=1e-10)


def test_the_effective_context_ends_where_more_gains_less_than_a_hundredth() -> None:
    losses = np.array([[3.0, 9.0], [2.9, 8.0], [2.89, 7.9], [2.889, 7.899]])
    contexts = [10, 20, 30, 40]
    assert relative_length(contexts, losses, losses, 1.0) == 30
    assert relative_length(contexts, losses, losses, 0.5) == 30
    # a longer context that is worse for every token gains nothing: min(b, l) is b
    worse = losses[[0, 1, 1, 2]] + [[0], [0], [1], [0]]
    assert relative_length(contexts, worse, worse, 1.0) == 20


def test_a_model_gains_nothing_by_context_that_others_do_not_need() -> None:
    """Appendix C's reason for groups: alone, a model that is bad with little context looks as if it
    used a long one.
    """
    contexts = [10, 20, 30]
    good, bad = np.array([[3.0], [2.9], [2.9]]), np.array([[5.0], [4.0], [3.0]])
    assert relative_length(contexts, bad, bad, 1.0) == 30
    assert relative_length(contexts, bad, np.minimum(good, bad), 1.0) == 10
    assert relative_length(contexts, good, np.minimum(good, bad), 1.0) == 20
    # the hardest are those that are hard for every model: not the second, which `good` knows
    good, bad = np.array([[3.0, 1.0], [2.0, 1.0]]), np.array([[3.5, 9.0], [3.5, 0.5]])
    assert relative_length([10, 20], good, np.minimum(good, bad), 0.5) == 20
    assert relative_length([10, 20], bad, np.minimum(good, bad), 0.5) == 10


def test_an_effective_context_of_the_longest_one_is_a_lower_bound() -> None:
    recl = {"0.1": 8, "1.0": 16}
    assert describe_recl(recl, 16) == "8 (r = 0.1), at least 16 (r = 1.0)"


def test_contexts_reach_twice_the_longest_memory_of_a_group() -> None:
    group = [model_of(memories={"xl": partial(XlCache, length=length)}) for length in (2, MEMORY)]
    long = model_of(memories={"xl": partial(XlCache, length=100)})
    assert [*choose_contexts(group, text_of(60))] == [*range(1, 17)]
    assert [*choose_contexts([group[0], long], text_of(300))] == [*range(13, 205, 13)]
    # 16 targets have so many tokens before them
    assert [*choose_contexts([long], text_of(60))] == [*range(3, 46, 3)]
    with pytest.raises(UsageError, match="fewer than 16"):
        choose_contexts(group, text_of(3, 2))


def test_a_single_context_has_nothing_to_be_compared_with(model: LoadedModel) -> None:
    with pytest.raises(UsageError, match="single"):
        measure_context(model, text_of(20), [8])


def test_targets_are_as_many_as_the_tokens_that_are_read_allow(model: LoadedModel) -> None:
    text, part = text_of(200), text_of(200)
    part.labels[0][np.arange(200) % 4 != 0] = IGNORE
    whole = measure_context(model, text, [20, 40]).targets
    scored = measure_context(model, part, [20, 40]).targets
    assert (len(whole.position), len(scored.position)) == (16 * 200 // 60, 40)


def test_arms_with_other_memories_are_one_group(model: LoadedModel) -> None:
    text = text_of(60, 40)
    long = model_of(memories={"xl": partial(XlCache, length=30)})
    probe = PROBES["context"]
    values = probe.compare([probe.measure(one, text) for one in (model, long)])
    assert [one.keys() for one in values] == [{"recl_r0.1", "recl_r1.0"}] * 2


def test_windows_score_the_same_tokens_at_every_length(model: LoadedModel) -> None:
    text = text_of(16, 33)
    measured = extrapolation(model, text, (1, 2, 4, 8, 16), windows=3)
    assert [point.context for point in measured.points] == [4, 8, 16, 32]
    assert (measured.scored, measured.windows, measured.longest) == (2, 1, 33)
    # within one segment both ways are one pass; beyond, the cache of MEMORY tokens is less than all
    assert measured.points[0].streamed == measured.points[0].recomputed
    assert measured.points[2].streamed != measured.points[2].recomputed
    ids = text.documents[1][:32]
    with torch.no_grad():
        states, _ = model.decoder(torch.from_numpy(ids[16:])[None])
    labels = torch.from_numpy(text.labels[1][30:32])
    logits = model.decoder.vocabulary.logits(states[0, -2:])
    expected = F.cross_entropy(logits, labels).item()
    assert measured.points[2].recomputed.value == pytest.approx(expected, abs=1e-10)


def answers_in_first_halves(*lengths: int) -> Text:
    """Documents that are scored at the beginning of their last whole segment alone."""
    text = text_of(*lengths)
    for labels in text.labels:
        last = len(labels) // SEQ_LEN * SEQ_LEN - SEQ_LEN
        labels[:last], labels[last + 2 :] = IGNORE, IGNORE
    return text


def test_windows_end_where_tokens_are_scored(model: LoadedModel) -> None:
    """Answers in the first half of a segment are in the last half of no whole number of them."""
    text = answers_in_first_halves(24, 24, 9)
    measured = extrapolation(model, text, (1, 2, 4, 8), windows=5)
    assert [point.context for point in measured.points] == [4, 8, 16]
    assert (measured.windows, measured.points[2].streamed.tokens) == (2, 4)
    targets = Targets(np.array([0, 0, 1, 1]), np.array([20, 21, 20, 21]))
    cold = [cold_losses(model, text, targets, 4), cold_losses(model, text, targets, 3)]
    expected = np.where(targets.position == 21, *cold).mean()  # the window of a segment: 18..21
    assert measured.points[0].recomputed.value == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("text", [text_of(3, 7), answers_in_first_halves(7, 7)])
def test_without_longer_windows_there_is_no_extrapolation(model: LoadedModel, text: Text) -> None:
    with pytest.raises(UsageError, match="two segments"):
        PROBES["extrapolation"].measure(model, text)


def test_key_tokens_are_decided_by_the_long_context() -> None:
    short, full = np.array([9.0, 5.0, 5.0, 1.0, 5.0]), np.array([1.0, 1.0, 2.5, 0.5, 2.9])
    document, position = np.zeros(5, int), np.arange(5) + SEQ_LEN - 1
    keys = key_tokens(
        TokenLosses(full, document, position), TokenLosses(short, document, position), SEQ_LEN
    )
    assert (keys.tokens, keys.share) == (1, 0.25)  # the first lies in the first segment
    assert keys.perplexity == pytest.approx(np.exp(1.0))
    assert keys.short_perplexity == pytest.approx(np.exp(5.0))


def test_attention_shares_are_those_of_the_softmax() -> None:
    ids = tokens(3, SEQ_LEN)
    sinks = attention_sinks(model_of(memories={"registers": partial(Registers, count=2)}), ids)
    assert 0 < sinks["registers"].mean < 1
    assert 0 < sinks["first_token"].mean < 1
    assert attention_sinks(model_of(memories={}), tokens(1, 2))["first_token"].mean == (
        pytest.approx(attention_to_the_first_of_two(), abs=1e-12)
    )


@pytest.mark.parametrize("memories", [{}, XL], ids=["alone", "xl-cache"])
def test_registers_are_worth_what_the_same_weights_lose_without_them(
    memories: dict[str, Any],
) -> None:
    registers = {"registers": partial(Registers, count=2)}
    model, text = model_of(memories=memories | registers), text_of(3, 7, 21)
    weights = model.decoder.state_dict()
    plain = model_of(memories=memories)
    plain.decoder.load_state_dict(
        {name: value for name, value in weights.items() if "registers" not in name}
    )
    losses, without = (token_losses(one, text, SEQ_LEN) for one in (model, plain))
    gain = register_gain(model, text, losses, SEQ_LEN)
    assert gain.value == pytest.approx(without.mean - losses.mean, abs=1e-12) != 0
    again = token_losses(model, text, SEQ_LEN)
    np.testing.assert_array_equal(losses.nll, again.nll, "the model is as it was")
    assert PROBES["sinks"].measure(model, text)["register_gain"] == gain.value
    assert PROBES["sinks"].measure(plain, text)["register_gain"] == 0
    with pytest.raises(UsageError, match="no layer of this model attends to registers"):
        register_gain(plain, text, without, SEQ_LEN)


@pytest.mark.parametrize("frame", ["none", "reference"])
@pytest.mark.parametrize("reach", [40, 2], ids=["all", "short"])
def test_dependence_on_segments_is_what_their_cut_changes_and_nothing_else(
    frame: Literal["none", "reference"], reach: int
) -> None:
    def model_with(length: int) -> LoadedModel:
        registers, xl = partial(Registers, count=2), partial(XlCache, length=length)
        rope = partial(Rope, sink_frame=frame)
        return model_of(memories={"registers": registers, "xl": xl}, positional=rope)

    model, keeps_all, text = model_with(reach), model_with(1_000), text_of(3, 7, 21)
    changes = []
    for ids in text.documents:
        whole = stream(model.decoder, padded(ids), SEQ_LEN)
        pieces, state = [], None
        for place, token in enumerate(padded(ids)[0]):
            states, state = keeps_all.decoder(token[None, None], state)
            pieces.append(states)
            if (place + 1) % SEQ_LEN == 0:
                state = tree_map(lambda tensor: tensor[:, -reach:], state)
        nll = [losses_of(model, ids, read[0, : len(ids)]) for read in (whole, torch.cat(pieces, 1))]
        changes.append(np.abs(nll[0] - nll[1]))
    losses = token_losses(model, text, SEQ_LEN)
    found = segment_dependence(model, text, losses, SEQ_LEN)
    assert found.value == pytest.approx(np.concatenate(changes).mean(), rel=1e-9, abs=1e-12)
    assert (found.value < 1e-12) == (frame == "none")
    assert PROBES["segments"].measure(model, text) == {"segment_dependence": found.value}
    again = token_losses(model, text, SEQ_LEN)
    np.testing.assert_array_equal(losses.nll, again.nll, "the model is as it was")
    with pytest.raises(UsageError, match="segments of one token"):
        segment_dependence(model, text, losses, 1)


def attention_to_the_first_of_two() -> float:
    """The second of two tokens' attention to the first, over layers and heads, from q and k."""
    decoder, ids, shares = tiny(memories={}), tokens(1, 2), []
    for block in decoder.blocks:
        attention: Any = block.attention

        def record(blocks: Any, attention: Any = attention) -> Tensor:
            q, k = blocks[0].q[0, 1], blocks[0].k[0]  # [H, D], [2, H, D]
            scores = torch.einsum("hd,nhd->hn", q, k) / q.shape[-1] ** 0.5
            shares.append(scores.softmax(-1)[:, 0])
            output: Tensor = type(attention.backend).forward(attention.backend, blocks)
            return output

        attention.backend.forward = record
    with torch.no_grad():
        decoder(ids)
    return float(torch.cat(shares).mean())


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((30, 1, 4, 3), (2, SEQ_LEN)),  # documents with a whole segment
        ((3, 3, 1), (2, 3)),  # none has one
        ((5,) * 9, (8, SEQ_LEN)),
    ],
)
def test_a_short_document_shortens_none_of_those_that_are_probed(
    model: LoadedModel, sizes: Sequence[int], shape: tuple[int, int]
) -> None:
    text = text_of(*sizes)
    ids = probe_batch(model, text)
    assert ids.shape == shape
    np.testing.assert_array_equal(ids[0], text.documents[0][: shape[1]])


def test_narrow_caches_cost_little_and_bfloat16_next_to_nothing(model: LoadedModel) -> None:
    text = text_of(20, 9)
    full = token_losses(model, text, SEQ_LEN)
    errors = {one.dtype: one for one in narrow_errors(model, text, SEQ_LEN, full)}
    assert set(errors) == {"bfloat16", "float8", "int8"}
    assert 0 < errors["int8"].largest < errors["float8"].largest < 0.5
    with pytest.raises(UsageError, match="keeps anything"):
        narrow_errors(model_of(memories={}), text, SEQ_LEN, full)


def test_repeated_n_grams_are_counted() -> None:
    assert repeated_share([1, 2, 1, 2, 1, 2], 2) == pytest.approx(1 - 2 / 5)
    assert repeated_share([1, 2, 3], 2) == 0.0
    assert repeated_share([1], 2) == 0.0


def test_continuations_are_greedy(model: LoadedModel) -> None:
    measured = measure_repetition(model, text_of(9, 3, 7), prompt=5, tokens=6, continuations=4)
    assert (measured.continuations, measured.tokens) == (2, 6)
    with pytest.raises(UsageError, match="5 tokens"):
        measure_repetition(model, text_of(3), prompt=5, tokens=6, continuations=4)


def test_recall_is_counted_by_distance_over_answers_alone(model: LoadedModel) -> None:
    text = text_of(9, 6, 12, 8)
    names = ["distance 2/x", "distance 1/y", "distance 2/z", "other"]
    predicted = []  # by the model, document by document
    for number, ids in enumerate(text.documents):
        with torch.no_grad():
            states = stream(model.decoder, padded(ids), SEQ_LEN)[0, : len(ids)]
            predicted.append(model.decoder.vocabulary.logits(states).argmax(-1).numpy())
        text.labels[number][::2] = predicted[-1][::2]  # every second one is right
        text.labels[number][:3] = IGNORE
    text = text._replace(names=names)
    near, far = recall_by_distance(model, text)
    assert (near.distance, far.distance) == (1, 2)
    for point, documents in ((near, [1]), (far, [0, 2])):
        hits = [(predicted[n] == text.labels[n])[text.labels[n] != IGNORE] for n in documents]
        assert point.accuracy.value == pytest.approx(np.concatenate(hits).mean())
        assert point.accuracy.tokens == sum(map(len, hits))
    with pytest.raises(UsageError, match="recall task"):
        recall_by_distance(model, text_of(9))


SHORT = {
    *("memory", "effective_context", "extrapolation", "key_tokens"),
    *("narrow_memory", "recall", "repetition", "segment_dependence"),
}


@pytest.mark.parametrize(
    ("parts", "sizes", "left_out"),
    [
        ({"memories": XL}, (3, 2), SHORT | {"registers"}),
        ({"memories": XL | {"registers": partial(Registers, count=2)}}, (3, 2), SHORT),
        (
            {"memories": {}},
            (40, 2),
            {"memory", "key_tokens", "narrow_memory", "registers", "recall", "segment_dependence"},
        ),
    ],
)
def test_what_is_not_measured_is_listed_with_the_reason(
    parts: dict[str, Any], sizes: Sequence[int], left_out: set[str]
) -> None:
    text = evaluate_text(model_of(**parts), text_of(*sizes), Asked(SEQ_LEN))
    assert text["left_out"].keys() == left_out
    assert {name for name, one in text.items() if one is None} == {*left_out, "recall_chance"}
    for name, why in text["left_out"].items():
        assert "--" not in why
        assert f"left out: {name.replace('_', ' ')}: {why}" in printed(text)


def test_lengths_that_were_asked_for_are_refused_by_their_option(model: LoadedModel) -> None:
    for asked in (Asked(SEQ_LEN, memory=[9]), Asked(SEQ_LEN, contexts=[3, 30])):
        with pytest.raises(UsageError, match=r"--(memory|context): no"):
            evaluate_text(model, text_of(9), asked)


def test_chance_is_what_the_frequencies_of_answers_allow(model: LoadedModel) -> None:
    text = text_of(9, 9)._replace(names=["distance 1/x", "distance 2/y"])
    for labels, answers in zip(text.labels, ([5, 5, 6], [7]), strict=True):
        labels[:] = IGNORE
        labels[8 - len(answers) : 8] = answers
    chance = chance_level(text)
    assert (chance.accuracy, chance.answers) == (0.5, 3)
    assert chance.loss == pytest.approx(1.5 * np.log(2) + 2 / 8)
    measured = evaluate_text(model, text, Asked(SEQ_LEN, memory=[]))
    assert measured["recall_chance"] == chance._asdict()
    assert "Chance: accuracy 0.5000, loss 1.2897 nats" in printed(measured)
    axes = Figure().subplots()
    draw_recall(axes, measured, "k", "a")
    dotted = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [[*line.get_ydata()] for line in dotted] == [[0.5, 0.5]]


def test_gains_by_position_in_the_segment_are_printed(model: LoadedModel) -> None:
    text = evaluate_text(model, text_of(40), Asked(SEQ_LEN, memory=[]))
    *_, last = text["memory"][-1]["by_position"]
    assert last["from"] == 2
    out = printed(text).partition("a: Memory gain by position in the segment")[2]
    assert f"2 .. 3 {last['value']:+.4f} 18 " in out.partition("a: ")[0]
    assert "from an empty memory 1 x 4" in out


def test_intervals_are_over_documents() -> None:
    documents = np.repeat(np.arange(40), 50)
    noise = np.random.default_rng(0).normal(size=40)[documents]
    mean = mean_over_tokens(noise, documents)
    assert mean.interval is not None
    width = mean.interval[1] - mean.interval[0]
    assert width == pytest.approx(2 * 1.96 * noise[::50].std(ddof=1) / 40**0.5, rel=0.1)
    assert mean_over_tokens(noise[:200], documents[:200]).interval is None


def test_documents_are_drawn_until_there_are_enough_tokens() -> None:
    sizes = np.array([5, 50, 7, 9, 4, 6])
    chosen, size = choose_documents(sizes, Limits(20, 10))
    assert size == 10, "all documents together have more"
    read = np.minimum(sizes[chosen], 10)
    assert read.sum() >= 20 > read[:-1].sum()
    assert chosen != sorted(chosen)


@pytest.mark.parametrize(
    ("sizes", "tokens", "size"),
    [
        ([300], 100, 100),  # a single one is read up to the tokens that were asked for
        ([300], 1000, 300),
        ([300, 5, 200], 105, 50),  # short ones leave more to the others
        ([300, 5, 200], 1000, 300),
        ([300] * 50, 100, 10),
    ],
)
def test_documents_are_read_further_where_they_are_few(
    sizes: list[int], tokens: int, size: int
) -> None:
    chosen, read = choose_documents(np.array(sizes), Limits(tokens, 10))
    assert read == size
    assert np.minimum(np.array(sizes)[chosen], read).sum() >= min(tokens, sum(sizes))


def test_documents_are_read_as_far_as_a_memory_that_was_asked_for() -> None:
    assert limits_for(100, SEQ_LEN) == Limits(100, 16 * SEQ_LEN)
    assert limits_for(100, SEQ_LEN, reach=1000) == Limits(100, 1000 + 2 * SEQ_LEN)


def test_a_memory_longer_than_what_was_read_is_cured_by_reading_more(model: LoadedModel) -> None:
    text = text_of(20)._replace(whole=Whole(3, 5000, 3000))
    with pytest.raises(UsageError, match="larger --tokens: there is a document of 3,000"):
        memory_gain(model, text, SEQ_LEN, [100])


# ---------- the command


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    return make_run(tmp_path_factory.mktemp("evaluated"))


def test_a_run_is_evaluated_on_its_held_out_text(
    run_directory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--tokens", 600, "--memory", "0,4,32", "--context", "4,8,12", "--out", tmp_path / "e"]
    code, out, err = evaluate(capsys, run_directory, *words, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report == json.loads(tmp_path.joinpath("e", "evaluation.json").read_text())
    text = report["texts"]["held-out"]
    assert [point["memory"] for point in text["memory"]] == [0, 4, 32, None]
    assert text["memory"][-1]["loss"] == text["loss"]
    by_context = text["effective_context"]["losses"]
    assert [one["context"] for one in by_context] == [4, 8, 12]
    gaps = [one["value"] - by_context[-1]["value"] for one in by_context]
    assert [one["over_longest"]["value"] for one in by_context] == pytest.approx(gaps, abs=1e-9)
    assert text["left_out"].keys() == {"recall"}
    assert text["loss"]["tokens"] == text["tokens"] >= 600
    bits = text["loss"]["value"] / np.log(2)
    assert text["bits_per_byte"] == pytest.approx(bits), "what is read of documents is all bytes"
    assert {"evaluation.md", "evaluation.html", "evaluation.png"} < {
        path.name for path in tmp_path.joinpath("e").iterdir()
    }
    written = [tmp_path.joinpath("e", f"evaluation.{kind}").read_text() for kind in ("md", "html")]
    for form in (*written, render_text(report)):
        assert "held-out: Loss by position in the document" in form
        assert "Read in segments of 16 tokens" in form and f"{text['perplexity']:.2f}" in form


@pytest.mark.slow
def test_effective_contexts_are_measured_in_a_group_of_models(
    run_directory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [run_directory, "--tokens", 600, "--context", "4,8,12"]
    _, out, _ = evaluate(capsys, *words, "--json")
    alone = json.loads(out)["texts"]["held-out"]["effective_context"]
    code, out, _ = evaluate(capsys, *words, "--among", run_directory, "--json")
    assert code == 0
    group = json.loads(out)["texts"]["held-out"]["effective_context"]
    assert group["recl_of_others"] == {str(run_directory): group["recl"]}
    assert group["recl"] == alone["recl"], "with itself a model is as alone"
    _, out, _ = evaluate(capsys, *words, "--among", run_directory)
    least = "at least " if alone["recl"]["0.1"] == alone["longest_context"] == 12 else ""
    assert f"RECL. this model: {least}{alone['recl']['0.1']:,} (r = 0.1)" in " ".join(out.split())
    assert f"; {run_directory}: " in " ".join(out.split())


def test_a_group_of_models_has_one_tokenizer(
    run_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_another(path: Path, registry: Registry) -> LoadedModel:
        model = load_run(path, registry).model
        return model._replace(tokenizer=Integers(size=64))

    monkeypatch.setattr("lswt_core.cli.load_model.load_model", load_another)
    code, _, err = evaluate(capsys, run_directory, "--among", run_directory, "--tokens", 64)
    assert code == 2 and f"--among {run_directory}: its tokenizer" in err and "fix:" in err


def test_several_texts_are_named_and_a_long_file_is_read_as_far_as_was_asked_for(
    run_directory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    deep = tmp_path / ("long" * 50)  # legends have no room for such a path
    deep.mkdir()
    book, other, out = deep / "book.txt", tmp_path / "other", tmp_path / "e"
    book.write_text("sense and sensibility, " * 1000)
    other.mkdir()
    other.joinpath("a.txt").write_text("pride and prejudice " * 20)
    words = ["--text", book, "--text", f"b={other}", "--tokens", 300, "--out", out]
    code, printed, _ = evaluate(capsys, run_directory, *words, "--memory", 8, "--context", "4,8")
    assert code == 0
    texts = json.loads(out.joinpath("evaluation.json").read_text())["texts"]
    assert list(texts) == [str(book), "b"]
    assert texts[str(book)]["tokens"] == texts[str(book)]["tokens_read"] == 300
    assert texts[str(book)]["whole"] == {"documents": 1, "tokens": 23_001, "longest": 23_001}
    written = [out.joinpath(f"evaluation.{kind}").read_text() for kind in ("md", "html")]
    for form in (*written, printed):
        assert "read: 300 of 23,001 tokens, of 1 of 1 document)" in " ".join(form.split())


def probed_arm(directory: Path) -> ArmResult:
    """An arm with a run that finished and one that failed."""
    outcomes = [Outcome(0, loss=3.0, probes={"isotropy": 0.5}), Outcome.failed(1, "diverged")]
    stored = {0: ("key", str(directory))}
    return ArmResult("arm", "", [], 1, 1, 1, 1, {}, [], outcomes, stored)


@pytest.mark.parametrize(
    "names", [["memory", "sinks"], pytest.param([*PROBES], marks=pytest.mark.slow)]
)
def test_runs_of_an_ablation_are_probed_once(
    names: list[str],
    run_directory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_directory.joinpath(probe_runs.FILE).unlink(missing_ok=True)
    _, out, _ = evaluate(capsys, run_directory, "--json")
    text = json.loads(out)["texts"]["held-out"]
    said: list[str] = []

    def probe() -> Outcome:
        [arm] = ProbedRuns(names, Registry(), said.append).add([probed_arm(run_directory)])
        assert arm.outcomes[1].probes == {}, "a run that failed has no model"
        return arm.outcomes[0]

    found = probe().probes
    assert found["isotropy"] == 0.5
    assert found["memory_gain"] == text["memory"][-1]["gain"]["value"]
    assert found["sink_rate_first_token"] == text["sinks"]["first_token"]["rate"]
    if len(names) > 2:
        assert found["repeated_2_grams"] == text["repetition"]["repeated"]["2"]
        assert found["recl_r1.0"] == text["effective_context"]["recl"]["1.0"]
        points = text["extrapolation"]["points"]
        gap = points[1]["recomputed"]["value"] - points[0]["recomputed"]["value"]
        assert found["x2_in_one_pass"] == gap
    once = ["arm, seed 0: probing " + ", ".join(names)]
    if "recall" in names:
        once.append("left out: recall: the documents of 'held-out' are not of a recall task")
    assert probe().probes == found and said == once, "they are kept beside the run"
    monkeypatch.setattr(probe_runs, "core_hash", lambda: "other code")
    assert probe().probes == found and said == 2 * once


def test_arms_of_a_seed_are_one_group_of_effective_contexts(tmp_path: Path) -> None:
    good, bad = [[3.0], [2.9], [2.9]], [[5.0], [4.0], [3.0]]
    said: list[str] = []

    def recl(seed: int, **losses: list[list[float]]) -> dict[str, float]:
        directories = {(arm, seed): tmp_path / f"{arm}{seed}" for arm in losses}
        for arm, own in losses.items():
            contexts = [10, 20, 30][: len(own)]
            measured = {"contexts": contexts, "losses": own, "targets": "same"} if own else {}
            directories[arm, seed].mkdir()
            probe_runs.keep_probe(directories[arm, seed], "context", measured)
        values = ProbedRuns(["context"], Registry(), said.append).values_of(directories)
        return {arm: found["recl_r1.0"] for (arm, _), found in values.items() if found}

    assert recl(0, bad=bad) == {"bad": 30}
    assert recl(1, good=good, bad=bad) == {"good": 20, "bad": 10}
    assert recl(3, good=good, without=[]) == {"good": 20}
    assert recl(4, without=[]) == {}
    assert not said
    assert recl(2, good=good, bad=bad[:2]) == {}, "they read different tokens"
    assert said == [
        "left out: context of seed 2: these models read different tokens, so that they are no group"
    ]


def test_probes_that_there_are_not_are_refused() -> None:
    with pytest.raises(UsageError, match="extrapolation"):
        require_probes(["memory", "remembering"])


def test_probes_are_compared_by_seed_in_the_report() -> None:
    pairs = [
        (
            Outcome(n, probes={"gain": 0.1 * n, "other": 1.0}),
            Outcome(n, probes={"gain": 0.1 * n + 1}),
        )
        for n in range(3)
    ]
    compared = compare_probes(pairs, 0.95)
    assert compared.keys() == {"gain"}, "the other one is not measured in both"
    assert compared["gain"]["delta"] == pytest.approx(1.0)
    assert compared["gain"]["ci95"] == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--text", "nowhere.txt"], 2, "there is no nowhere.txt"),
        (["--memory", "many"], 2, "whole numbers"),
        (["--memory", "100000"], 2, "at most"),
        (["--context", "8,100000", "--tokens", "64"], 2, "longer documents"),
        (["--context", "8", "--tokens", "64"], 2, "--context: RECL compares"),
        (["--tokens", "0"], 2, "at least 1"),
        (["--text", "empty.txt"], 4, "no text"),
        (["--text", "a=a.txt", "--text", "a=a.txt"], 2, "same name"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    words: list[str],
    code: int,
    why: str,
    run_directory: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("empty.txt").write_text(" \n")
    tmp_path.joinpath("a.txt").write_text("sense")
    got, _, err = evaluate(capsys, run_directory, *words)
    assert (got, why in err) == (code, True), err
