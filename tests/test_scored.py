"""Documents of which some tokens alone are predicted: from the source to the loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_parts import BEGIN, END
from helpers import DIMS, stream, tiny
from lswt_bytes import Bytes
from lswt_mixture import Mixture
from lswt_recall import AssociativeRecall, Copy, Induction, Integers, Phonebook
from lswt_xl_cache import XlCache
from nano import NANO
from runs import inside, lines

from lswt_core.__main__ import main
from lswt_core.data import ContiguousRows, StreamingRows, Tokens, tokenise
from lswt_core.data.scored import encode_documents, plain_ids
from lswt_core.data.unigram import count_labels
from lswt_core.decode.load_run import LoadedModel
from lswt_core.device import Precision
from lswt_core.errors import DataError
from lswt_core.evaluation.recall import recall_by_distance
from lswt_core.evaluation.texts import Text, Whole, labels_of
from lswt_core.interfaces import IGNORE, DataSource, Document

# text with the characters that are scored in brackets; a bracket at the end scores the end
MARKED = ["ask[me]no", "[all of it]", "none", "é[ü]x[y", "", "q[a]q[b]"]


def document(number: int, marked: str) -> Document:
    """A document of a marked text."""
    text, scored, begin = "", list[tuple[int, int]](), None
    for character in marked:
        if character == "[":
            begin = len(text)
        elif character == "]":
            assert begin is not None
            scored.append((begin, len(text)))
            begin = None
        else:
            text += character
    if begin is not None:
        scored.append((begin, len(text) + 1))
    return Document(str(number), text, tuple(scored))


class Marked(DataSource):
    """Documents with scored ranges."""

    name = "marked"
    selects_scored = True

    def documents(self, split: str) -> Iterator[Document]:
        yield from (document(number, marked) for number, marked in enumerate(MARKED))

    def fingerprint(self) -> str:
        return str(MARKED)


def expected() -> list[tuple[int, int]]:
    """Input and label of every token, document after document."""
    tokens: list[tuple[int, int]] = []
    for one in (document(number, marked) for number, marked in enumerate(MARKED)):
        if not one.text:
            continue
        scored: list[bool] = []
        for i, character in enumerate(f"{one.text}$"):
            is_scored = any(begin <= i < end for begin, end in one.scored or ())
            scored += [is_scored] * (1 if i == len(one.text) else len(character.encode()))
        ids = [BEGIN, *one.text.encode(), END]
        labels = [id_ if kept else IGNORE for id_, kept in zip(ids[1:], scored, strict=True)]
        tokens += list(zip(ids, labels, strict=False))
    return tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return tokenise(Marked(), Bytes(), "train", tmp_path)


def test_rows_of_a_tokenised_text_have_its_labels(tokens: Tokens) -> None:
    size = len(expected())
    rows = ContiguousRows(
        tokens, END, global_batch_size=1, rows=range(1), seq_len=size, seed=0, shuffle=False
    )
    batch = rows.segment()
    assert list(zip(batch.inputs[0].tolist(), batch.labels[0].tolist(), strict=True)) == expected()


@pytest.mark.parametrize("size", [1, 5, 33])
def test_a_stream_has_the_same_labels_in_any_cut_and_after_any_stop(size: int) -> None:
    def rows() -> StreamingRows:
        return StreamingRows(
            Marked(), Bytes(), global_batch_size=1, rows=range(1), seq_len=size, seed=0
        )

    stream, read = rows(), list[tuple[int, int]]()
    while len(read) < len(expected()):
        resumed = rows()
        resumed.restore(stream.state())
        for batch in (stream.segment(), resumed.segment()):
            own = list(zip(batch.inputs[0].tolist(), batch.labels[0].tolist(), strict=True))
            assert own == (expected() * 2)[len(read) : len(read) + size]
        read += own
        stream.advance()


def test_labels_are_counted_as_they_are_predicted(tokens: Tokens) -> None:
    counts = np.zeros(258, dtype=int)
    for _, label in expected():
        if label != IGNORE:
            counts[label] += 1
    assert count_labels(tokens, END, 258).tolist() == counts.tolist()


def test_a_source_that_does_not_say_so_is_refused(tmp_path: Path) -> None:
    source = Marked()
    source.selects_scored = False
    with pytest.raises(DataError, match="selects_scored"):
        tokenise(source, Bytes(), "train", tmp_path)


@pytest.mark.parametrize("ranges", [((2, 1),), ((0, 2), (1, 3)), ((3, 9),)])
def test_ranges_that_are_none_are_refused(ranges: Any, tmp_path: Path) -> None:
    source = Marked()
    source.documents = lambda split: iter([Document("x", "text", ranges)])  # type: ignore[method-assign]
    with pytest.raises(DataError, match="range"):
        tokenise(source, Bytes(), "train", tmp_path)


def test_a_mixture_passes_ranges_on(tmp_path: Path) -> None:
    mixture = Mixture(sources={"one": Marked()})
    mixed = tokenise(mixture, Bytes(), "train", tmp_path)
    assert (mixed.ids == tokenise(Marked(), Bytes(), "train", tmp_path).ids).all()


# ---------- recall tasks

NANO_TASK: dict[str, Any] = {
    "tokens": 2,
    "segment": 4,
    "vocabulary": 26,
    "rounds": 1,
    "held_out": 8,
}
TASKS = [AssociativeRecall, Copy, Induction, Phonebook]


def segments(task: Any, one: Document) -> tuple[list[list[int]], list[list[int]]]:
    """Inputs and labels of a document's segments."""
    rows = ContiguousRows(
        stored(task, one), 65, global_batch_size=1, rows=range(1), seq_len=64, seed=0
    )
    inputs, labels = [], []
    for _ in range(rows.length // 64):
        batch = rows.segment()
        inputs.append(batch.inputs[0].tolist())
        labels.append(batch.labels[0].tolist())
        rows.advance()
    return inputs, labels


def stored(task: Any, one: Document) -> Tokens:
    """One document's tokens."""
    ids = encode_documents([one], Integers(size=64))[0].astype("<i4")
    return Tokens(ids, np.array([0]), 1, 0, [one.id], "")


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_so_many_segments_after_their_facts_and_nowhere_else(task: Any) -> None:
    source = task(distances=[1, 2], rounds=3)
    for one in islice(source.documents("valid"), 8):
        distance = int(re.match(r"distance (\d)/", one.id)[1])  # type: ignore[index]
        inputs, labels = segments(source, one)
        assert len(inputs) == 3 * 3
        for number, (own, asked) in enumerate(zip(inputs, labels, strict=True)):
            scored = [i for i, label in enumerate(asked) if label != IGNORE]
            assert bool(scored) == (number % 3 == 2)
            facts = inputs[number - distance] if scored else []
            for i in scored:
                if own[i] != 1:  # the cue, which a copy begins with
                    assert [own[i], asked[i]] in [facts[j : j + 2] for j in range(len(facts))]


def test_rows_are_not_all_asked_at_the_same_step() -> None:
    sizes = {len(one.text.split()) + 1 for one in islice(Copy().documents("train"), 20)}
    assert sizes == {8 * 128, 8 * 128 + 64}
    assert {len(one.text.split()) + 1 for one in Copy(held_out=5).documents("valid")} == {8 * 128}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_goes_on_where_its_state_says(task: Any) -> None:
    source = task(documents=5)
    read, state = [], None
    for one in source.documents("train"):
        read.append(one)
        state = source.state() if len(read) == 3 else state
    assert len(read) == 5 == len(set(read))
    assert list(task(documents=5).documents("train", after=state)) == read[3:]
    assert not set(read) & set(task(held_out=5).documents("valid"))


@pytest.mark.parametrize(
    ("task", "options", "why"),
    [
        (Copy, {"tokens": 64}, "segment"),
        (AssociativeRecall, {"pairs": 14, "vocabulary": 16}, "vocabulary"),
        (Induction, {"tokens": 4, "questions": 4}, "questions"),
        (Phonebook, {"entries": 2, "questions": 3}, "questions"),
        (Copy, {"distances": []}, "distances"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(task: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        task(**options)


RECALL = (
    NANO.replace('use = "text"\npaths = ["{corpus}"]', 'use = "copy"\nheld_out = 8\nrounds = 3')
    + """
[memory.xl]
use = "xl-cache"
length = 64
[optimizer]
use = "adamw"
lr = 1e-2
[schedule]
warmup_steps = 2
[tokenizer]
use = "integers"
size = 64
[train]
batch_size = 2
seq_len = 64
steps = 5
[evaluate]
tokens = 512
batch_size = 2
[sample]
prompt = ""
"""
)


def test_a_run_trains_and_is_judged_on_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "nano.toml"
    recipe.write_text(RECALL)
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path / "cache"))
    assert inside(monkeypatch, recipe, "--out", tmp_path / "run") == 0
    entries = lines(tmp_path / "run")
    steps = [entry for entry in entries if "lr" in entry]
    # every second segment asks nothing
    assert not all("loss" in entry for entry in steps)
    assert any("loss" in entry for entry in steps)
    evaluated = next(entry for entry in entries if "eval/tokens" in entry)
    # 256 tokens of each of two rows: two rounds
    assert evaluated["eval/tokens"] == 2 * 2 * 32
    out = capsys.readouterr().out
    assert "unigram" not in out, "a stream has no such baseline"
    assert f"lswt_core evaluate {tmp_path / 'run'}" in out and "--prompt" not in out
    assert main(["evaluate", str(tmp_path / "run"), "--json", "--tokens", "600"]) == 0
    evaluated = json.loads(capsys.readouterr().out)["texts"]["held-out"]
    assert evaluated["tokens"] == 2 * 3 * 32  # of two documents


def test_transformers_reads_the_tokenizer_of_numbers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours, texts = Integers(size=64), ["3 14  15\n9", "63 0", ""]
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    special = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert special == (ours.bos_id, ours.eos_id, ours.eos_id) and len(theirs) == ours.vocab_size
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        read = theirs(text)["input_ids"]
        assert read == [ours.bos_id, *ids]
        assert theirs.decode(read, skip_special_tokens=True) == ours.decode(ids)
    for text in ("64", "three"):
        with pytest.raises(Exception, match="WordLevel"):
            theirs(text)


def test_another_sequence_length_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "nano.toml"
    recipe.write_text(RECALL)
    assert inside(monkeypatch, recipe, "--out", tmp_path / "run", "train.seq_len=32") == 2


def in_mixture(**segments: int) -> str:
    """The recipe with a mixture of copies, each with its segment."""
    sources = [
        f'[data.sources.{name}]\nuse = "copy"\ntokens = 16\nheld_out = 8\nsegment = {segment}\n'
        for name, segment in segments.items()
    ]
    head, _, rest = RECALL.partition("[data]\n")
    return head + '[data]\nuse = "mixture"\n' + "".join(sources) + rest[rest.index("\n[") :]


def test_segments_of_sources_in_a_mixture_are_those_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "nano.toml"
    recipe.write_text(in_mixture(far=32))
    line = 1 + recipe.read_text().splitlines().index("[data.sources.far]") + 1
    assert inside(monkeypatch, recipe, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "segments of 32 tokens, and train.seq_len is 64" in error
    assert f"nano.toml:{line}   [data.sources.far] copy" in error


def test_sources_of_different_segments_are_not_mixed() -> None:
    recall = {"near": Copy(), "far": Copy(distances=[2])}
    assert Mixture(sources=recall).segment_length == 64
    assert Mixture(sources={"inner": Mixture(sources=recall)}).segment_length == 64
    assert Mixture(sources={"text": Marked()}).segment_length is None
    for other in (Copy(segment=128), Marked()):
        with pytest.raises(ValueError, match=r"far: 64, near: 64, other: (128|any)"):
            Mixture(sources={**recall, "other": other})


def test_recall_is_measured_by_distance_behind_the_names_of_mixtures() -> None:
    inner = Mixture(sources={"copy": Copy(**NANO_TASK, distances=[1, 3])})
    mixture = Mixture(sources={"far": Copy(**NANO_TASK, distances=[3]), "inner": inner})
    documents = list(mixture.documents("valid"))
    assert {one.id.rpartition("/distance")[0] for one in documents} == {"far", "inner/copy"}
    distances = [int(one.id.split("distance ")[1][0]) for one in documents]
    tokenizer, names = Integers(size=26), [one.id for one in documents]
    stored = encode_documents(documents, tokenizer)
    labels = [labels_of(ids, tokenizer.eos_id) for ids in stored]
    whole = Whole.of(np.array([len(ids) for ids in stored]))
    text = Text("tasks", [plain_ids(ids) for ids in stored], labels, names, 27, 2.0, whole)
    precision = Precision(torch.float32, "parameters as they are")
    model = LoadedModel(tiny().eval(), tokenizer, precision, NANO_TASK["segment"])
    points = recall_by_distance(model, text)
    assert [point.distance for point in points] == [1, 3]
    assert [point.accuracy.tokens for point in points] == [2 * distances.count(d) for d in (1, 3)]


@pytest.mark.parametrize("layers", [1, 2, 3])
@torch.no_grad()
def test_cached_keys_reach_back_layers_times_their_length(layers: int) -> None:
    segment = NANO_TASK["segment"]
    model = tiny(dims=DIMS._replace(n_layers=layers), memories={"xl": partial(XlCache, length=4)})
    reached = []
    for distance in range(1, 6):
        (document,) = Copy(**NANO_TASK | {"held_out": 1}, distances=[distance]).documents("valid")
        ids = torch.tensor([[26, *map(int, document.text.split())]])
        other = ids.clone()
        other[0, 1] -= 1  # a fact, of the first segment
        assert (ids.shape[1], ids[0, 1]) == ((distance + 1) * segment, ids[0, -segment + 1])
        answers = [stream(model, one, segment)[:, -segment:] for one in (ids, other)]
        reached += [distance] if not answers[0].equal(answers[1]) else []
    assert reached == list(range(1, layers + 1))
