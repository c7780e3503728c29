"""Multi-token prediction against dense logits of the whole text, and the labels it looks at."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_parts import TEXTS, Given
from helpers import DIMS, distance, tiny, tokens
from lswt_bytes import Bytes
from lswt_multi_token import MultiToken
from lswt_soft_cap import SoftCapped
from lswt_tied import Tied
from lswt_xl_cache import XlCache
from runs import assert_same_bits, final, inside, lines, write_recipe
from test_rows import made
from test_step import differentiated, largest_gap, step_of
from torch import Tensor
from torch.nn.functional import layer_norm

from lswt_core.ablation.runs.recorded_session import RecordedRows
from lswt_core.data import PrefetchedRows, Rows, Tokens, tokenise
from lswt_core.interfaces import IGNORE, Batch
from lswt_core.model.initialise import initialise
from lswt_core.model.train_module import TrainModule
from lswt_core.plugin_api.future_labels import labels_after

LENGTH, N_TOKENS = 10, 4
AHEAD = N_TOKENS - 1
BORDERS = [[0, 4, 12], [0, 1, 2], [9]]  # where documents begin, in every row of the text


def model_of(head: Any = Tied, **options: Any) -> TrainModule:
    """A decoder with a long memory that is trained by multi-token prediction as well."""
    decoder = tiny(head=head, memories={"xl": partial(XlCache, length=64)})
    auxiliary = MultiToken(DIMS, n_tokens=N_TOKENS, **options)
    initialise(auxiliary, seed=1, std=0.4)
    return TrainModule(decoder, {"mtp": (auxiliary.double(), 0.7)})


def text_of(masked: bool) -> tuple[Tensor, Tensor | None]:
    """Ids [3, LENGTH + N_TOKENS], and where the document of each begins."""
    ids = tokens(3, LENGTH + N_TOKENS, 5)
    if not masked:
        return ids, None
    starts = [
        [max([b for b in row if b <= t], default=-1) for t in range(ids.shape[1])]
        for row in BORDERS
    ]
    return ids, torch.tensor(starts)


def segment_of(ids: Tensor, starts: Tensor | None, begin: int, end: int) -> Batch:
    """A segment of a text, as data rows give it."""
    labels, ahead = ids[:, 1:], ids[:, end + 1 : end + 1 + AHEAD]
    first_visible = None
    if starts is not None:
        first_visible = starts[:, begin:end] - begin
        ahead = ahead.masked_fill(starts[:, end : end + AHEAD] >= end, IGNORE)
    return Batch(
        ids[:, begin:end], labels[:, begin:end], first_visible=first_visible, labels_ahead=ahead
    )


def by_hand(loss: TrainModule, ids: Tensor, starts: Tensor | None) -> tuple[Tensor, int]:
    """Sum and number of negative log-likelihoods, token by token, from dense logits."""
    first_visible = None if starts is None else starts[:, :LENGTH]
    states, _ = loss.decoder(ids[:, :LENGTH], None, first_visible)
    total, count = states.new_zeros(()), 0
    for k, head in enumerate(loss.auxiliary["mtp"].heads, start=1):
        moved = (
            states
            + layer_norm(states, (16,), head.norm.weight, head.norm.bias) @ head.linear.weight.T
        )
        log_p = loss.decoder.vocabulary.logits(moved).log_softmax(-1)
        for row in range(len(ids)):
            for t in range(LENGTH):
                if starts is None or starts[row, t + k] == starts[row, t]:
                    total, count = total - log_p[row, t, ids[row, t + 1 + k]], count + 1
    return total, count


@pytest.mark.parametrize("size", [10, 5, 1])
@pytest.mark.parametrize("masked", [False, True], ids=["one text", "documents"])
def test_segments_of_any_size_are_the_formula_on_the_whole_text(size: int, masked: bool) -> None:
    loss, (ids, starts) = model_of(), text_of(masked)
    total, count, state = torch.zeros((), dtype=torch.float64), 0, None
    for begin in range(0, LENGTH, size):
        batch = segment_of(ids, starts, begin, begin + size)
        result = loss(batch, state)
        term, state = result.terms["mtp"], result.state
        assert int(term.count) == int(loss.counts(batch)["mtp"])
        total, count = total + term.total, count + int(term.count)
    expected, number = by_hand(loss, ids, starts)
    assert distance(total, expected) < 1e-10 and count == number
    if size == LENGTH:  # memories take no gradient
        weights = list(loss.parameters())
        pair = [
            torch.autograd.grad(one, weights, materialize_grads=True) for one in (total, expected)
        ]
        assert max(distance(a, b) for a, b in zip(*pair, strict=True)) < 1e-10
        assert all(bool(p.any()) for p in pair[0][-3 * AHEAD :])


def test_it_is_scored_by_the_models_own_head() -> None:
    loss, (ids, _) = model_of(partial(SoftCapped, cap=0.8)), text_of(False)
    batch = segment_of(ids, None, 0, LENGTH)
    expected, _ = by_hand(loss, ids, None)
    for create_graph in (False, True):
        total = loss(batch, create_graph=create_graph).terms["mtp"].total
        assert distance(total, expected) < 1e-10


def test_without_labels_ahead_those_of_the_segment_count() -> None:
    ids, _ = text_of(False)
    batch = segment_of(ids, None, 0, LENGTH)._replace(labels_ahead=None)
    assert int(MultiToken(DIMS, n_tokens=N_TOKENS).count(batch)) == 3 * (9 + 8 + 7)
    assert labels_after(batch, 2)[:, -3:].tolist() == [
        [int(row[10]), IGNORE, IGNORE] for row in ids
    ]
    assert bool((labels_after(batch, 12) == IGNORE).all())


def test_padding_neither_predicts_nor_is_predicted() -> None:
    labels = torch.tensor([[IGNORE, 4, 5, IGNORE, 7]])
    batch = Batch(labels, labels, labels_ahead=torch.tensor([[8, 9]]))
    assert labels_after(batch, 1).tolist() == [[IGNORE, 5, IGNORE, IGNORE, 8]]
    assert labels_after(batch, 2).tolist() == [[IGNORE, IGNORE, 7, IGNORE, 9]]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_micro_batches_are_the_whole(micro_batch_size: int) -> None:
    ids, starts = text_of(True)
    batch = segment_of(torch.cat((ids, ids)), torch.cat((starts, starts)), 0, LENGTH)  # type: ignore[arg-type]
    batch = batch.map(lambda tensor: tensor[:4])
    loss = model_of()
    whole, parted = step_of(loss, 4, batch=batch), step_of(loss, micro_batch_size, batch=batch)
    pair = [differentiated(loss, step, "data") for step in (whole, parted)]
    assert largest_gap(*pair) < 1e-12
    parted.check_counts()


# ---------- labels ahead


KINDS = pytest.mark.parametrize("kind", ["contiguous", "least-loaded", "round-robin"])


@pytest.fixture
def corpus(tmp_path: Path) -> Tokens:
    return tokenise(Given(TEXTS), Bytes(), "train", tmp_path)


def read_all(rows: Rows, count: int) -> list[Batch]:
    """The next batches."""
    batches = []
    for _ in range(count):
        batches.append(rows.segment())
        rows.advance()
    return batches


@KINDS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lookahead", [2, 13])  # 13: beyond the next segment
def test_labels_ahead_are_the_next_segments(
    kind: str, masked: bool, lookahead: int, corpus: Tokens
) -> None:
    plain = read_all(made(kind, corpus, document_masking=masked), 14)
    ahead = read_all(made(kind, corpus, document_masking=masked, lookahead=lookahead), 12)
    labels = torch.cat([batch.labels for batch in plain], 1)
    for number, (own, wide) in enumerate(zip(plain, ahead, strict=False)):
        assert own == own._replace(labels_ahead=None)
        for a, b in zip(own[:4], wide[:4], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
        end = own.labels.shape[1] * (number + 1)
        expected = labels[:, end : end + lookahead]
        if masked:
            starts = [
                batch.first_visible + own.labels.shape[1] * i for i, batch in enumerate(plain)
            ]
            begins = torch.cat(starts, 1)[:, end : end + lookahead]
            expected = expected.masked_fill(begins >= end, IGNORE)
        assert torch.equal(wide.labels_ahead, expected), number
    assert not masked or any(bool((batch.labels_ahead == IGNORE).any()) for batch in ahead)


@KINDS
def test_looking_ahead_changes_no_position(kind: str, corpus: Tokens) -> None:
    first = PrefetchedRows(made(kind, corpus, lookahead=3), pin_memory=False)
    read_all(first, 5)
    state, expected = first.state(), read_all(made(kind, corpus), 9)[5:]
    for rows in (made(kind, corpus), made(kind, corpus, lookahead=3)):
        rows.restore(state)
        for ahead, batch in zip(read_all(rows, 4), expected, strict=True):
            assert ahead.inputs.equal(batch.inputs) and ahead.labels.equal(batch.labels)
    first.close()


def test_arms_with_and_without_it_read_the_same_batches(corpus: Tokens, tmp_path: Path) -> None:
    for name, lookahead in {"plain": 0, "ahead": 3}.items():
        rows = RecordedRows(made("contiguous", corpus, lookahead=lookahead), tmp_path / name, 0)
        read_all(rows, 3)
        rows.close()
    hashes = tmp_path.joinpath("plain").read_text()
    assert len(hashes.split()) == 3 and tmp_path.joinpath("ahead").read_text() == hashes


# ---------- a whole run


@pytest.mark.slow
def test_a_run_is_trained_resumed_and_starts_both_tables_from_one_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    table = np.random.default_rng(0).normal(size=(320, 24)).astype(np.float32)
    np.savez(tmp_path / "table.npz", table=table)
    options = [
        "head.use=untied",
        "head.soft_cap=20.0",
        "embedding.warm_start=table.npz",
        "loss.mtp.use=multi-token",
        "loss.mtp.weight=0.3",
        "loss.mtp.n_tokens=3",
        "train.document_masking=true",
        "checkpoint.memory=replay",
        "train.steps=6",
        "evaluate.every=0",
        "checkpoint.every=3",
    ]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert inside(monkeypatch, recipe, *options, "--out", whole) == 0
    assert inside(monkeypatch, recipe, *options, "train.steps=3", "--out", parted) == 0
    assert inside(monkeypatch, recipe, *options, "--accept-changes", "--out", parted) == 0
    assert_same_bits(whole, parted)
    logged = [line for line in lines(whole) if "loss/mtp" in line]
    assert len(logged) == 6 and logged[-1]["loss/mtp"] < logged[0]["loss/mtp"]
    assert any("eval/mtp" in line for line in lines(whole))
    for name in ("table", "unembedding"):  # both begin as the source's rows
        trained = final(whole)[f"model/decoder.vocabulary.{name}.weight"]
        assert 0 < distance(trained, torch.from_numpy(table)) < 0.1  # type: ignore[arg-type]
