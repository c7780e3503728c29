"""The rows that are read from tokens or from a stream of documents."""

import json
import threading
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from data_parts import BEGIN, END, TEXTS, Given, laid
from lswt_bytes import Bytes

from lswt_core.data import ContiguousRows, PrefetchedRows, Rows, StreamingRows, Tokens, tokenise
from lswt_core.errors import DataError
from lswt_core.interfaces import Batch, Document

torch.set_num_threads(1)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return tokenise(Given(TEXTS), Bytes(), "train", tmp_path)


def contiguous(
    tokens: Tokens,
    global_batch_size: int,
    seq_len: int,
    rows: range | None = None,
    **options: object,
) -> ContiguousRows:
    return ContiguousRows(
        tokens,
        END,
        global_batch_size=global_batch_size,
        rows=rows or range(global_batch_size),
        seq_len=seq_len,
        **{"seed": 3, **options},
    )


def stream(
    global_batch_size: int,
    seq_len: int,
    rows: range | None = None,
    texts: list[str] = TEXTS,
    **options: object,
) -> StreamingRows:
    return StreamingRows(
        Given(texts),
        Bytes(),
        global_batch_size=global_batch_size,
        rows=rows or range(global_batch_size),
        seq_len=seq_len,
        seed=3,
        **options,
    )


def read(rows: Rows, count: int) -> tuple[list, list, list]:
    """The next segments joined, one list a row: inputs, labels, starts as places in the row's whole
    reading.
    """
    parts = []
    for number in range(count):
        batch = rows.segment()
        first_visible = (
            torch.zeros_like(batch.inputs)
            if batch.first_visible is None
            else batch.first_visible + number * batch.inputs.shape[1]
        )
        parts.append(torch.stack((batch.inputs, batch.labels, first_visible)))
        rows.advance()
    inputs, labels, first_visible = torch.cat(parts, dim=2).tolist()
    return inputs, labels, first_visible


def order(tokens: Tokens, epoch: int, seed: int = 3) -> list[str]:
    """The texts of an epoch as a single row meets them."""
    size = len(tokens.ids)
    inputs, _, _ = read(contiguous(tokens, 1, size, seed=seed), epoch + 1)
    joined = inputs[0][epoch * size :]
    borders = [place for place, value in enumerate(joined) if value == BEGIN] + [size]
    return [bytes(joined[a + 1 : b]).decode() for a, b in pairwise(borders)]


# ---------- contiguous rows


def test_streams_without_shuffling_are_the_texts_end_to_end(tokens: Tokens) -> None:
    expected, length = laid(TEXTS), len(tokens.ids) // 3
    inputs, labels, first_visible = read(
        contiguous(tokens, 3, 5, shuffle=False, document_masking=True), length // 5
    )
    for row in range(3):
        for place in range(length // 5 * 5):
            value, following, begin = expected[row * length + place]
            assert inputs[row][place] == value and labels[row][place] == following
            assert first_visible[row][place] == max(begin - row * length, 0)


@pytest.mark.parametrize(
    ("global_batch_size", "seq_len"), [(1, 1), (2, 7), (3, 11), (4, 25), (5, 20)]
)
def test_shuffled_streams_over_three_epochs(
    tokens: Tokens, global_batch_size: int, seq_len: int
) -> None:
    length = len(tokens.ids) // global_batch_size
    expected = [laid(order(tokens, epoch)) for epoch in range(4)]
    count = 3 * length // seq_len
    inputs, labels, first_visible = read(
        contiguous(tokens, global_batch_size, seq_len, document_masking=True), count
    )
    for row in range(global_batch_size):
        for place in range(count * seq_len):
            epoch, offset = divmod(place, length)
            value, following, begin = expected[epoch][row * length + offset]
            assert (inputs[row][place], labels[row][place]) == (value, following)
            assert first_visible[row][place] == max(begin - row * length, 0) + epoch * length


def test_epochs_differ_in_order_only(tokens: Tokens) -> None:
    orders = [order(tokens, epoch) for epoch in range(4)]
    assert all(sorted(one) == sorted(TEXTS) for one in orders)
    assert len({tuple(one) for one in orders}) > 1 and order(tokens, 0) == orders[0]
    assert any(order(tokens, 0, seed=other) != orders[0] for other in range(4, 8))


def test_labels_are_the_next_inputs_but_at_the_end_of_a_document(tokens: Tokens) -> None:
    inputs, labels, _ = read(contiguous(tokens, 2, 16), 2)
    for row in range(2):
        for following, label in zip(inputs[row][1:], labels[row], strict=False):
            assert label == (END if following == BEGIN else following)


def test_borders_are_not_told_when_carried(tokens: Tokens) -> None:
    batch = contiguous(tokens, 2, 8).segment()
    assert batch.first_visible is None and batch.valid is None
    assert batch.inputs.dtype == batch.labels.dtype == torch.int64 and batch.inputs.shape == (2, 8)


def test_one_document_fills_several_streams(tmp_path: Path) -> None:
    made = tokenise(Given(["abcdefgh"]), Bytes(), "train", tmp_path)
    inputs, labels, first_visible = read(contiguous(made, 3, 3, document_masking=True), 2)
    assert inputs == [[BEGIN, 97, 98] * 2, [99, 100, 101] * 2, [102, 103, 104] * 2]
    # a cut stream's last label is the true next token
    assert labels == [[97, 98, 99] * 2, [100, 101, 102] * 2, [103, 104, END] * 2]
    assert first_visible == [[0, 0, 0, 3, 3, 3]] * 3


def test_a_text_too_short_is_an_error_with_the_numbers(tokens: Tokens) -> None:
    with pytest.raises(DataError, match=f"{len(tokens.ids)} tokens.* 400"):
        contiguous(tokens, 4, 100)


# ---------- contiguous and streamed rows


def rows_of(
    kind: str, tokens: Tokens, rows: range | None = None, seq_len: int = 6, **options: object
) -> Rows:
    if kind == "contiguous":
        return contiguous(tokens, 4, seq_len, rows, **options)
    return stream(
        4,
        seq_len,
        rows,
        document_assignment="round-robin" if kind == "round-robin" else "least-loaded",
        **options,
    )


@pytest.mark.parametrize("kind", ["contiguous", "stream", "round-robin"])
@pytest.mark.parametrize("stop", [0, 1, 5, 6, 11, 19])
def test_any_resume_point_reads_the_same(tokens: Tokens, kind: str, stop: int) -> None:
    whole = read(rows_of(kind, tokens, document_masking=True), 24)
    first = rows_of(kind, tokens, document_masking=True)
    for _ in range(stop):
        first.advance()
    first.segment()  # looked at, not committed
    state = json.loads(json.dumps(first.state()))
    second = rows_of(kind, tokens, document_masking=True)
    second.restore(state)
    rest = read(second, 24 - stop)
    for complete, resumed, part in zip(whole, rest, ("inputs", "labels", "starts"), strict=True):
        moved = stop * 6 if part == "starts" else 0
        assert [row[stop * 6 :] for row in complete] == [
            [value + moved for value in row] for row in resumed
        ], part


@pytest.mark.parametrize("kind", ["contiguous", "stream", "round-robin"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_world_size_reads_the_same(tokens: Tokens, kind: str, world: int) -> None:
    whole, share = read(rows_of(kind, tokens), 20), 4 // world
    ranks = [
        rows_of(kind, tokens, range(rank * share, (rank + 1) * share)) for rank in range(world)
    ]
    read_by = [read(rank, 20) for rank in ranks]
    assert [
        list(chain.from_iterable(part[index] for part in read_by)) for index in range(3)
    ] == list(whole)
    assert all(rank.state() == ranks[0].state() for rank in ranks)


@pytest.mark.parametrize("kind", ["contiguous", "stream"])
def test_a_segment_stays_until_it_is_committed(tokens: Tokens, kind: str) -> None:
    rows = rows_of(kind, tokens)
    first, again = rows.segment(), rows.segment()
    rows.advance()
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, rows.segment().inputs)


@pytest.mark.parametrize("kind", ["contiguous", "stream"])
@pytest.mark.parametrize(
    ("options", "named"),
    [({"seq_len": 7}, "seq_len.* 6 .* 7"), ({"seed": 4}, "seed.* 3 .* 4")],
)
def test_a_state_of_other_rows_is_refused(
    tokens: Tokens, kind: str, options: dict, named: str
) -> None:
    state = rows_of(kind, tokens).state()
    if kind == "stream" and "seed" in options:
        state, named = {**state, "seed": 2}, "seed.* 2 .* 3"
        options = {}
    with pytest.raises(DataError, match=named):
        rows_of(kind, tokens, **options).restore(state)


def test_a_state_of_other_text_is_refused(tokens: Tokens, tmp_path: Path) -> None:
    other = [*TEXTS, "new"]
    with pytest.raises(DataError, match="its split"):
        contiguous(tokenise(Given(other), Bytes(), "train", tmp_path), 4, 6).restore(
            contiguous(tokens, 4, 6).state()
        )
    with pytest.raises(DataError, match="its split"):
        stream(4, 6, texts=other).restore(stream(4, 6).state())


# ---------- stream


def test_documents_are_dealt_to_the_shortest_row() -> None:
    seq_len, expected, dealt = 8, [[], [], []], 0
    texts = ["aaaa", "b" * 20, "", "c", "dd", "eeeeeee", "f" * 9]
    inputs, labels, first_visible = read(stream(3, seq_len, texts=texts, document_masking=True), 9)
    for segment in range(9):
        # the rule, written naively: deal while a row has no whole segment left
        while min(len(row) for row in expected) < (segment + 1) * seq_len:
            row = min(range(3), key=lambda index: len(expected[index]))
            text, dealt = texts[dealt % len(texts)], dealt + 1
            if text:
                expected[row] += [
                    (value, following, len(expected[row]) + begin)
                    for value, following, begin in laid([text])
                ]
    for row in range(3):
        for place in range(9 * seq_len):
            actual = (inputs[row][place], labels[row][place], first_visible[row][place])
            assert actual == expected[row][place]


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_a_stream_without_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text"):
        stream(2, 4, texts=texts).segment()


def test_resuming_at_the_end_of_a_source_begins_again() -> None:
    rows = stream(1, 4, texts=["abc"])
    read(rows, 1)
    state = rows.state()
    assert state["consumed"] == 1 and state["pending"][0]["lengths"] == []
    again = stream(1, 4, texts=["abc"])
    again.restore(state)
    assert read(again, 2) == read(rows, 2)


class Counting(Given):
    """Counts the documents that are read of it."""

    def documents(self, split: str, after: Any = None) -> Iterator[Document]:
        self.place = after["place"] if after else 0
        for document in [*super().documents(split)][self.place :]:
            self.place += 1
            self.reads += 1
            yield document


class Placed(Counting):
    """Has a state."""

    def state(self) -> dict[str, int]:
        return {"place": self.place}


MANY = [f"document {number} " * (number % 4) for number in range(2000)]  # eight groups


@pytest.mark.parametrize("stop", [1, 20, 150, 450])
@pytest.mark.parametrize("source", [Counting, Placed])
def test_a_stream_is_resumed_from_its_sources_state(
    source: type[Counting], stop: int, caplog: pytest.LogCaptureFixture
) -> None:
    def rows_of_source(texts: Counting) -> StreamingRows:
        return StreamingRows(texts, Bytes(), global_batch_size=2, rows=range(2), seq_len=64, seed=3)

    rows = rows_of_source(source(MANY))
    read(rows, stop)
    state = json.loads(json.dumps(rows.state()))
    texts = source(MANY)
    again = rows_of_source(texts)
    again.restore(state)
    again.segment()
    few = texts.reads <= 2 * 256 + 2  # what is left of a group, and the next
    assert few == (source is Placed or stop < 150)
    assert bool(caplog.text) == (source is Counting and stop >= 150)
    if caplog.text:
        assert f"{state['consumed']:,} documents" in caplog.text
    assert read(again, 300) == read(rows, 300)


# ---------- read ahead


def made(kind: str, tokens: Tokens, **options: Any) -> Rows:
    return (
        contiguous(tokens, 2, 9, **options)
        if kind == "contiguous"
        else stream(2, 9, document_assignment=kind, **options)
    )


KINDS = pytest.mark.parametrize("kind", ["contiguous", "least-loaded", "round-robin"])


@KINDS
@pytest.mark.parametrize("document_masking", [False, True])
def test_what_is_read_ahead_is_what_is_read(
    kind: str, document_masking: bool, tokens: Tokens
) -> None:
    plain, ahead = (
        made(kind, tokens, document_masking=document_masking),
        made(kind, tokens, document_masking=document_masking),
    )
    later = [ahead.segment(2 - i) for i in range(3)][::-1]
    for batch in later:
        assert all(
            torch.equal(a, b) for a, b in zip(plain.segment(), batch, strict=True) if a is not None
        )
        plain.advance()


@KINDS
def test_prefetched_rows_are_the_rows(kind: str, tokens: Tokens) -> None:
    plain, ahead = made(kind, tokens), PrefetchedRows(made(kind, tokens), pin_memory=False)
    assert read(ahead, 12) == read(plain, 12)
    saved = json.loads(json.dumps(ahead.state()))
    expected = read(plain, 7)
    again = PrefetchedRows(made(kind, tokens), pin_memory=False)
    for rows in (ahead, again):
        rows.restore(saved)
        assert torch.equal(rows.segment().inputs, rows.segment().inputs)
        assert read(rows, 7) == expected
        rows.close()


def test_the_next_segment_is_read_while_this_one_is_used() -> None:
    rows = PrefetchedRows(stream(2, 9), pin_memory=False)
    rows.segment()
    for task in rows.pending.values():
        task.result(timeout=10)
    assert set(rows.pending) == {0, 1}
    threads = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("prefetch") for name in threads)
    rows.close()
    assert not any(
        thread.name.startswith("prefetch") and thread.is_alive() for thread in rows.thread._threads
    )


class Failing(ContiguousRows):
    """Rows that cannot be read from their third segment on."""

    def segment(self, ahead: int = 0) -> Batch:
        if self.cursor + ahead * self.seq_len >= 2 * self.seq_len:
            raise DataError("the line is dead")
        return super().segment(ahead)


def test_what_goes_wrong_ahead_is_raised_where_it_is_needed(tokens: Tokens) -> None:
    rows = PrefetchedRows(
        Failing(tokens, END, global_batch_size=2, rows=range(2), seq_len=9, seed=3),
        pin_memory=False,
    )
    for _ in range(2):
        rows.segment()
        rows.advance()
    assert rows.state()["cursor"] == 18
    for _ in range(2):
        with pytest.raises(DataError, match="the line is dead"):
            rows.segment()
    rows.close()
