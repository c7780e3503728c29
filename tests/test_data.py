"""Tokens in the cache, and the rows that are read from them."""

import json
import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lswt_bytes import Bytes

from lswt_core.data import Lanes, Prefetched, Rows, Stream, Tokens, cache_directory, check_vocabulary, tokenise, unigram_perplexity
from lswt_core.errors import DataError, ResourceError
from lswt_core.interfaces import Batch, DataSource, Document

torch.set_num_threads(1)
BEGIN, END = 256, 257
TEXTS = ["alpha beta", "b", "c" * 37, "delta is a longer one, é included", "epsilon", "f" * 5]


class Given(DataSource):
    """Texts written down in the test."""

    name = "given"

    def __init__(self, texts: list[str], held: list[str] | None = None) -> None:
        self.texts = {"train": texts, "valid": held or []}
        self.reads = 0

    def documents(self, split: str) -> Iterator[Document]:
        self.reads += 1
        yield from (Document(f"{split}/{number}", text) for number, text in enumerate(self.texts[split]))

    def fingerprint(self) -> str:
        return json.dumps(self.texts)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return tokenise(Given(TEXTS), Bytes(), "train", tmp_path)


def lanes(tokens: Tokens, rows_total: int, context: int, rows: range | None = None, **options: object) -> Lanes:
    return Lanes(tokens, END, rows_total=rows_total, rows=rows or range(rows_total), context=context, **{"seed": 3, **options})


def stream(rows_total: int, context: int, rows: range | None = None, texts: list[str] = TEXTS, **options: object) -> Stream:
    return Stream(Given(texts), Bytes(), rows_total=rows_total, rows=rows or range(rows_total), context=context, seed=3, **options)


def read(rows: Rows, count: int) -> tuple[list, list, list]:
    """The next segments joined, one list a row: inputs, labels, starts as places in the row's whole reading."""
    parts = []
    for number in range(count):
        batch = rows.segment()
        starts = torch.zeros_like(batch.inputs) if batch.starts is None else batch.starts + number * batch.inputs.shape[1]
        parts.append(torch.stack((batch.inputs, batch.labels, starts)))
        rows.advance()
    inputs, labels, starts = torch.cat(parts, dim=2).tolist()
    return inputs, labels, starts


def laid(texts: list[str]) -> list[tuple[int, int, int]]:
    """Texts end to end, told token by token: input, label, place where its document begins."""
    told: list[tuple[int, int, int]] = []
    for text in texts:
        begin, ids = len(told), list(text.encode())
        told += [(value, following, begin) for value, following in zip([BEGIN, *ids], [*ids, END], strict=True)]
    return told


def order(tokens: Tokens, epoch: int, seed: int = 3) -> list[str]:
    """The texts of an epoch as a single row meets them."""
    size = len(tokens.ids)
    inputs, _, _ = read(lanes(tokens, 1, size, seed=seed), epoch + 1)
    joined = inputs[0][epoch * size :]
    borders = [place for place, value in enumerate(joined) if value == BEGIN] + [size]
    return [bytes(joined[a + 1 : b]).decode() for a, b in pairwise(borders)]


# ---------------------------------------------------------------------------------------------------------------- tokens


def test_tokens_are_the_documents_each_after_begin(tokens: Tokens) -> None:
    assert tokens.ids.tolist() == [value for value, _, _ in laid(TEXTS)]
    assert [tokens.ids[start] for start in tokens.starts] == [BEGIN] * len(TEXTS)
    assert tokens.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert tokens.names == [f"train/{number}" for number in range(len(TEXTS))]
    assert tokens.ids.dtype == np.uint16 and isinstance(tokens.ids, np.memmap)


def test_a_second_time_nothing_is_read(tmp_path: Path) -> None:
    source, seen = Given(TEXTS), []
    first = tokenise(source, Bytes(), "train", tmp_path, lambda *told: seen.append(told))
    again = tokenise(source, Bytes(), "train", tmp_path)
    assert source.reads == 1 and seen == [(len(TEXTS), first.n_bytes, None)]
    assert np.array_equal(first.ids, again.ids) and first.names == again.names and first.fingerprint == again.fingerprint
    assert [path.suffix for path in tmp_path.iterdir()] == [".bin"]


def test_groups_are_tokenised_ahead_in_their_order_one_at_a_time(tmp_path: Path) -> None:
    texts = [str(number) * 3 for number in range(700)]  # three groups
    running: list[str] = []

    class Watched(Bytes):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            assert not running
            running.append(threading.current_thread().name)
            found = super().encode(texts)
            assert running.pop().startswith("tokenise")
            return found

    seen: list[int] = []
    made = tokenise(Given(texts), Watched(), "train", tmp_path, lambda documents, size, total: seen.append(documents))
    assert made.ids.tolist() == [value for value, _, _ in laid(texts)] and seen == [256, 512, 700]


def test_what_goes_wrong_in_a_tokenizer_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken(Bytes):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            raise ValueError("no such letter")

    with pytest.raises(ValueError, match="no such letter"):
        tokenise(Given(TEXTS), Broken(), "train", tmp_path)
    assert not list(tmp_path.iterdir()) and not [t for t in threading.enumerate() if t.name.startswith("tokenise")]


def test_other_text_split_or_tokenizer_is_another_file(tmp_path: Path) -> None:
    class Other(Bytes):
        def fingerprint(self) -> str:
            return "other"

    source = Given(TEXTS, held=["x"])
    made = [tokenise(source, Bytes(), "train", tmp_path), tokenise(source, Bytes(), "valid", tmp_path)]
    made += [tokenise(source, Other(), "train", tmp_path), tokenise(Given([*TEXTS, "g"]), Bytes(), "train", tmp_path)]
    assert len({one.fingerprint for one in made}) == 4 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("place", [0, 100, -1, -10, -60, -200])
@pytest.mark.parametrize("damage", ["flip", "cut", "zero"])
def test_a_damaged_file_is_made_again(tokens: Tokens, tmp_path: Path, place: int, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    broken = bytearray(whole)
    if damage == "flip":
        broken[place] ^= 1
    path.write_bytes({"flip": bytes(broken), "cut": whole[:place], "zero": b"\0" * len(whole)}[damage])
    source = Given(TEXTS)
    again = tokenise(source, Bytes(), "train", tmp_path)
    assert source.reads == 1 and again.ids.tolist() == [value for value, _, _ in laid(TEXTS)] and path.read_bytes() == whole
    assert path.name in caplog.text


PROCESS = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from typing import Any
from test_data import Given, TEXTS, Bytes, tokenise
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    made = tokenise(Given([*TEXTS, str(number)]), Bytes(), "train", Path({cache!r}))
    assert len(made.starts) == len(TEXTS) + 1
"""


def test_two_processes_at_once(tmp_path: Path) -> None:
    code = PROCESS.format(path=[str(Path(__file__).parent), *sys.path], cache=str(tmp_path))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # only now may either begin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(list(tmp_path.iterdir())) == 20 and {path.suffix for path in tmp_path.iterdir()} == {".bin"}


@pytest.mark.parametrize(("held", "counted"), [([], "not one document"), (["", ""], "2 documents, all of them empty")])
def test_a_split_without_text_is_an_error_and_leaves_nothing(tmp_path: Path, held: list[str], counted: str) -> None:
    with pytest.raises(DataError, match=rf"the valid split of data source 'given' has no text: {counted}"):
        tokenise(Given(TEXTS, held), Bytes(), "valid", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    made = tokenise(Given(["", "a", "", "b"]), Bytes(), "train", tmp_path)
    assert made.n_empty == 2 and made.names == ["train/1", "train/3"] and made.ids.tolist() == [BEGIN, 97, BEGIN, 98]


def test_many_documents_and_wide_ids(tmp_path: Path) -> None:
    class Wide(Bytes):
        size = 100_000

        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[99_000 + len(text)] for text in texts]

    texts = ["x" * (number % 7 + 1) for number in range(600)]
    made = tokenise(Given(texts), Wide(), "train", tmp_path)
    assert made.ids.dtype == np.uint32 and made.ids[1::2].tolist() == [99_000 + len(text) for text in texts]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="LSWT_CACHE_DIR"):
        tokenise(Given(TEXTS), Bytes(), "train", tmp_path / "file" / "cache")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("LSWT_CACHE_DIR")
    assert cache_directory() == Path.home() / ".cache" / "lswt"


# ----------------------------------------------------------------------------------------------------------------- lanes


def test_lanes_without_shuffling_are_the_texts_end_to_end(tokens: Tokens) -> None:
    told, length = laid(TEXTS), len(tokens.ids) // 3
    inputs, labels, starts = read(lanes(tokens, 3, 5, shuffle=False, documents="reset"), length // 5)
    for row in range(3):
        for place in range(length // 5 * 5):
            value, following, begin = told[row * length + place]
            assert inputs[row][place] == value and labels[row][place] == following
            assert starts[row][place] == max(begin - row * length, 0)


@pytest.mark.parametrize(("rows_total", "context"), [(1, 1), (2, 7), (3, 11), (4, 25), (5, 20)])
def test_shuffled_lanes_over_three_epochs(tokens: Tokens, rows_total: int, context: int) -> None:
    length = len(tokens.ids) // rows_total
    told = [laid(order(tokens, epoch)) for epoch in range(4)]
    count = 3 * length // context
    inputs, labels, starts = read(lanes(tokens, rows_total, context, documents="reset"), count)
    for row in range(rows_total):
        for place in range(count * context):
            epoch, offset = divmod(place, length)
            value, following, begin = told[epoch][row * length + offset]
            assert (inputs[row][place], labels[row][place]) == (value, following)
            assert starts[row][place] == max(begin - row * length, 0) + epoch * length


def test_epochs_differ_in_order_only(tokens: Tokens) -> None:
    orders = [order(tokens, epoch) for epoch in range(4)]
    assert all(sorted(one) == sorted(TEXTS) for one in orders)
    assert len({tuple(one) for one in orders}) > 1 and order(tokens, 0) == orders[0]
    assert any(order(tokens, 0, seed=other) != orders[0] for other in range(4, 8))


def test_labels_are_the_next_inputs_but_at_the_end_of_a_document(tokens: Tokens) -> None:
    inputs, labels, _ = read(lanes(tokens, 2, 16), 2)
    for row in range(2):
        for following, label in zip(inputs[row][1:], labels[row], strict=False):
            assert label == (END if following == BEGIN else following)


def test_borders_are_not_told_when_carried(tokens: Tokens) -> None:
    batch = lanes(tokens, 2, 8).segment()
    assert batch.starts is None and batch.valid is None
    assert batch.inputs.dtype == batch.labels.dtype == torch.int64 and batch.inputs.shape == (2, 8)


def test_one_document_fills_several_lanes(tmp_path: Path) -> None:
    made = tokenise(Given(["abcdefgh"]), Bytes(), "train", tmp_path)
    inputs, labels, starts = read(lanes(made, 3, 3, documents="reset"), 2)
    assert inputs == [[BEGIN, 97, 98] * 2, [99, 100, 101] * 2, [102, 103, 104] * 2]
    assert labels == [[97, 98, 99] * 2, [100, 101, 102] * 2, [103, 104, END] * 2]  # a cut lane's last label is the true next token
    assert starts == [[0, 0, 0, 3, 3, 3]] * 3


def test_a_text_too_short_is_an_error_with_the_numbers(tokens: Tokens) -> None:
    with pytest.raises(DataError, match=f"{len(tokens.ids)} tokens, 4 rows of 100 tokens need 400"):
        lanes(tokens, 4, 100)


# ---------------------------------------------------------------------------------------------------- lanes and streams


def rows_of(kind: str, tokens: Tokens, rows: range | None = None, context: int = 6, **options: object) -> Rows:
    if kind == "lanes":
        return lanes(tokens, 4, context, rows, **options)
    return stream(4, context, rows, dealing="in-turn" if kind == "in-turn" else "evenly", **options)


@pytest.mark.parametrize("kind", ["lanes", "stream", "in-turn"])
@pytest.mark.parametrize("stop", [0, 1, 5, 6, 11, 19])
def test_any_resume_point_reads_the_same(tokens: Tokens, kind: str, stop: int) -> None:
    whole = read(rows_of(kind, tokens, documents="reset"), 24)
    first = rows_of(kind, tokens, documents="reset")
    for _ in range(stop):
        first.advance()
    first.segment()  # looked at, not committed
    state = json.loads(json.dumps(first.state()))
    second = rows_of(kind, tokens, documents="reset")
    second.restore(state)
    rest = read(second, 24 - stop)
    for complete, resumed, part in zip(whole, rest, ("inputs", "labels", "starts"), strict=True):
        moved = stop * 6 if part == "starts" else 0
        assert [row[stop * 6 :] for row in complete] == [[value + moved for value in row] for row in resumed], part


@pytest.mark.parametrize("kind", ["lanes", "stream", "in-turn"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_world_size_reads_the_same(tokens: Tokens, kind: str, world: int) -> None:
    whole, share = read(rows_of(kind, tokens), 20), 4 // world
    ranks = [rows_of(kind, tokens, range(rank * share, (rank + 1) * share)) for rank in range(world)]
    read_by = [read(rank, 20) for rank in ranks]
    assert [list(chain.from_iterable(part[index] for part in read_by)) for index in range(3)] == list(whole)
    assert all(rank.state() == ranks[0].state() for rank in ranks)


@pytest.mark.parametrize("kind", ["lanes", "stream"])
def test_a_segment_stays_until_it_is_committed(tokens: Tokens, kind: str) -> None:
    rows = rows_of(kind, tokens)
    first, again = rows.segment(), rows.segment()
    rows.advance()
    assert torch.equal(first.inputs, again.inputs) and not torch.equal(first.inputs, rows.segment().inputs)


@pytest.mark.parametrize("kind", ["lanes", "stream"])
@pytest.mark.parametrize(("options", "named"), [({"context": 7}, "context was 6 and is 7"), ({"seed": 4}, "seed was 3 and is 4")])
def test_a_state_of_other_rows_is_refused(tokens: Tokens, kind: str, options: dict, named: str) -> None:
    state = rows_of(kind, tokens).state()
    if kind == "stream" and "seed" in options:
        state, named = {**state, "seed": 2}, "seed was 2 and is 3"
        options = {}
    with pytest.raises(DataError, match=named):
        rows_of(kind, tokens, **options).restore(state)


def test_a_state_of_other_text_is_refused(tokens: Tokens, tmp_path: Path) -> None:
    other = [*TEXTS, "new"]
    with pytest.raises(DataError, match="the text, its tokenizer or its split changed"):
        lanes(tokenise(Given(other), Bytes(), "train", tmp_path), 4, 6).restore(lanes(tokens, 4, 6).state())
    with pytest.raises(DataError, match="the text, its tokenizer or its split changed"):
        stream(4, 6, texts=other).restore(stream(4, 6).state())


# ---------------------------------------------------------------------------------------------------------------- stream


def test_documents_are_dealt_to_the_shortest_row() -> None:
    context, told, dealt = 8, [[], [], []], 0
    texts = ["aaaa", "b" * 20, "", "c", "dd", "eeeeeee", "f" * 9]
    inputs, labels, starts = read(stream(3, context, texts=texts, documents="reset"), 9)
    for segment in range(9):  # the rule, told naively: deal while a row has no whole segment left
        while min(len(row) for row in told) < (segment + 1) * context:
            row = min(range(3), key=lambda index: len(told[index]))
            text, dealt = texts[dealt % len(texts)], dealt + 1
            if text:
                told[row] += [(value, following, len(told[row]) + begin) for value, following, begin in laid([text])]
    for row in range(3):
        for place in range(9 * context):
            assert (inputs[row][place], labels[row][place], starts[row][place]) == told[row][place]


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


# -------------------------------------------------------------------------------------------------------------- measures


def test_unigram_perplexity_against_counting(tmp_path: Path) -> None:
    source = Given(["aab", "ab"], held=["abz"])
    train, valid = (tokenise(source, Bytes(), split, tmp_path) for split in ("train", "valid"))
    seen = Counter([97, 97, 98, END, 97, 98, END])
    losses = [-math.log((seen[label] + 1) / (7 + 300)) for label in [97, 98, 122, END]]
    assert unigram_perplexity(train, valid, END, 300) == pytest.approx(math.exp(sum(losses) / 4), rel=1e-12)


def test_unigram_perplexity_where_begin_is_end(tmp_path: Path) -> None:
    class Same(Bytes):
        begin = end = 256

    source = Given(["aab", "ab"], held=["ab"])
    train, valid = (tokenise(source, Same(), split, tmp_path) for split in ("train", "valid"))
    losses = [-math.log((count + 1) / (7 + 257)) for count in (3, 2, 2)]
    assert unigram_perplexity(train, valid, 256, 257) == pytest.approx(math.exp(sum(losses) / 3), rel=1e-12)


def test_vocabulary_must_fit() -> None:
    check_vocabulary(Bytes(), 258)
    with pytest.raises(DataError, match=r"258 ids, the embedding table 257 rows: set embedding.vocab_size to at least 258"):
        check_vocabulary(Bytes(), 257)


# ---------------------------------------------------------------------------------------------------------- read ahead


def made(kind: str, tokens: Tokens, **options: Any) -> Rows:
    return lanes(tokens, 2, 9, **options) if kind == "lanes" else stream(2, 9, dealing=kind, **options)


KINDS = pytest.mark.parametrize("kind", ["lanes", "evenly", "in-turn"])


@KINDS
@pytest.mark.parametrize("documents", ["carry", "reset"])
def test_what_is_read_ahead_is_what_is_read(kind: str, documents: str, tokens: Tokens) -> None:
    plain, ahead = made(kind, tokens, documents=documents), made(kind, tokens, documents=documents)
    later = [ahead.segment(2 - i) for i in range(3)][::-1]
    for batch in later:
        assert all(torch.equal(a, b) for a, b in zip(plain.segment(), batch, strict=True) if a is not None)
        plain.advance()


@KINDS
def test_prefetched_rows_are_the_rows(kind: str, tokens: Tokens) -> None:
    plain, ahead = made(kind, tokens), Prefetched(made(kind, tokens), pinned=False)
    assert read(ahead, 12) == read(plain, 12)
    saved = json.loads(json.dumps(ahead.state()))
    wanted = read(plain, 7)
    again = Prefetched(made(kind, tokens), pinned=False)
    for rows in (ahead, again):
        rows.restore(saved)
        assert torch.equal(rows.segment().inputs, rows.segment().inputs)
        assert read(rows, 7) == wanted
        rows.close()


def test_the_next_segment_is_read_while_this_one_is_used() -> None:
    rows = Prefetched(stream(2, 9), pinned=False)
    rows.segment()
    for task in rows.ahead.values():
        task.result(timeout=10)
    assert set(rows.ahead) == {0, 1}
    threads = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("prefetch") for name in threads)
    rows.close()
    assert not any(thread.name.startswith("prefetch") and thread.is_alive() for thread in rows.thread._threads)


class Failing(Lanes):
    """Rows that cannot be read from their third segment on."""

    def segment(self, ahead: int = 0) -> Batch:
        if self.cursor + ahead * self.context >= 2 * self.context:
            raise DataError("the line is dead")
        return super().segment(ahead)


def test_what_goes_wrong_ahead_is_raised_where_it_is_needed(tokens: Tokens) -> None:
    rows = Prefetched(Failing(tokens, END, rows_total=2, rows=range(2), context=9, seed=3), pinned=False)
    for _ in range(2):
        rows.segment()
        rows.advance()
    assert rows.state()["cursor"] == 18
    for _ in range(2):
        with pytest.raises(DataError, match="the line is dead"):
            rows.segment()
    rows.close()
