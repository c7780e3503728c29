"""Tokens in the cache."""

import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from data_parts import BEGIN, END, TEXTS, Given, laid
from lswt_bytes import Bytes

from lswt_core.data import Tokens, cache_directory, check_vocabulary, tokenise, unigram_perplexity
from lswt_core.errors import DataError, ResourceError

torch.set_num_threads(1)


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    return tokenise(Given(TEXTS), Bytes(), "train", tmp_path)


# ---------- tokens


def test_tokens_are_the_documents_each_after_begin(tokens: Tokens) -> None:
    assert tokens.ids.tolist() == [value for value, _, _ in laid(TEXTS)]
    assert [tokens.ids[start] for start in tokens.document_starts] == [BEGIN] * len(TEXTS)
    assert tokens.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert tokens.names == [f"train/{number}" for number in range(len(TEXTS))]
    assert tokens.ids.dtype == np.uint16 and isinstance(tokens.ids, np.memmap)


def test_a_second_time_nothing_is_read(tmp_path: Path) -> None:
    source, reports = Given(TEXTS), []
    first = tokenise(source, Bytes(), "train", tmp_path, lambda *told: reports.append(told))
    again = tokenise(source, Bytes(), "train", tmp_path)
    assert source.reads == 1 and reports == [(len(TEXTS), first.n_bytes, None)]
    assert np.array_equal(first.ids, again.ids)
    assert first.names == again.names
    assert first.fingerprint == again.fingerprint
    assert [path.suffix for path in tmp_path.iterdir()] == [".bin"]


def test_groups_are_tokenised_ahead_in_their_order_one_at_a_time(tmp_path: Path) -> None:
    texts = [str(number) * 3 for number in range(700)]  # three groups
    running: list[str] = []

    class Watched(Bytes):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            assert not running
            running.append(threading.current_thread().name)
            ids = super().encode(texts)
            assert running.pop().startswith("tokenise")
            return ids

    counts: list[int] = []
    made = tokenise(
        Given(texts),
        Watched(),
        "train",
        tmp_path,
        lambda documents, size, total: counts.append(documents),
    )
    assert made.ids.tolist() == [value for value, _, _ in laid(texts)] and counts == [256, 512, 700]


def test_what_goes_wrong_in_a_tokenizer_leaves_nothing_behind(tmp_path: Path) -> None:
    class Broken(Bytes):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            raise ValueError("no such letter")

    with pytest.raises(ValueError, match="no such letter"):
        tokenise(Given(TEXTS), Broken(), "train", tmp_path)
    assert not list(tmp_path.iterdir())
    assert not [t for t in threading.enumerate() if t.name.startswith("tokenise")]


def test_other_text_split_or_tokenizer_is_another_file(tmp_path: Path) -> None:
    class Other(Bytes):
        def fingerprint(self) -> str:
            return "other"

    source = Given(TEXTS, held=["x"])
    made = [
        tokenise(source, Bytes(), "train", tmp_path),
        tokenise(source, Bytes(), "valid", tmp_path),
    ]
    made += [
        tokenise(source, Other(), "train", tmp_path),
        tokenise(Given([*TEXTS, "g"]), Bytes(), "train", tmp_path),
    ]
    assert len({one.fingerprint for one in made}) == 4 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("place", [0, 100, -1, -10, -60, -200])
@pytest.mark.parametrize("damage", ["flip", "cut", "zero"])
def test_a_damaged_file_is_made_again(
    tokens: Tokens, tmp_path: Path, place: int, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    broken = bytearray(whole)
    if damage == "flip":
        broken[place] ^= 1
    path.write_bytes(
        {"flip": bytes(broken), "cut": whole[:place], "zero": b"\0" * len(whole)}[damage]
    )
    source = Given(TEXTS)
    again = tokenise(source, Bytes(), "train", tmp_path)
    assert source.reads == 1
    assert again.ids.tolist() == [value for value, _, _ in laid(TEXTS)]
    assert path.read_bytes() == whole
    assert path.name in caplog.text


PROCESS = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from typing import Any
from data_parts import TEXTS, Given
from lswt_bytes import Bytes
from lswt_core.data import tokenise
print("ready", flush=True)
sys.stdin.readline()
for number in range(20):
    made = tokenise(Given([*TEXTS, str(number)]), Bytes(), "train", Path({cache!r}))
    assert len(made.document_starts) == len(TEXTS) + 1
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    code = PROCESS.format(path=[str(Path(__file__).parent), *sys.path], cache=str(tmp_path))
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # only now may either begin
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(list(tmp_path.iterdir())) == 20
    assert {path.suffix for path in tmp_path.iterdir()} == {".bin"}


@pytest.mark.parametrize(("held", "counted"), [([], "not one"), (["", ""], "2 documents")])
def test_a_split_without_text_is_an_error_and_leaves_nothing(
    tmp_path: Path, held: list[str], counted: str
) -> None:
    with pytest.raises(DataError, match=rf"valid .*'given' .*{counted}"):
        tokenise(Given(TEXTS, held), Bytes(), "valid", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_empty_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    made = tokenise(Given(["", "a", "", "b"]), Bytes(), "train", tmp_path)
    assert made.n_empty == 2
    assert made.names == ["train/1", "train/3"]
    assert made.ids.tolist() == [BEGIN, 97, BEGIN, 98]


def test_many_documents_and_wide_ids(tmp_path: Path) -> None:
    class Wide(Bytes):
        vocab_size = 100_000

        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[99_000 + len(text)] for text in texts]

    texts = ["x" * (number % 7 + 1) for number in range(600)]
    made = tokenise(Given(texts), Wide(), "train", tmp_path)
    assert made.ids.dtype == np.uint32
    assert made.ids[1::2].tolist() == [99_000 + len(text) for text in texts]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="LSWT_CACHE_DIR"):
        tokenise(Given(TEXTS), Bytes(), "train", tmp_path / "file" / "cache")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LSWT_CACHE_DIR", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.delenv("LSWT_CACHE_DIR")
    assert cache_directory() == Path.home() / ".cache" / "lswt"


# ---------- measures


def test_unigram_perplexity_against_counting(tmp_path: Path) -> None:
    source = Given(["aab", "ab"], held=["abz"])
    train, valid = (tokenise(source, Bytes(), split, tmp_path) for split in ("train", "valid"))
    counts = Counter([97, 97, 98, END, 97, 98, END])
    losses = [-math.log((counts[label] + 1) / (7 + 300)) for label in [97, 98, 122, END]]
    assert unigram_perplexity(train, valid, END, 300) == pytest.approx(
        math.exp(sum(losses) / 4), rel=1e-12
    )


def test_unigram_perplexity_where_begin_is_end(tmp_path: Path) -> None:
    class Same(Bytes):
        begin = end = 256

    source = Given(["aab", "ab"], held=["ab"])
    train, valid = (tokenise(source, Same(), split, tmp_path) for split in ("train", "valid"))
    losses = [-math.log((count + 1) / (7 + 257)) for count in (3, 2, 2)]
    assert unigram_perplexity(train, valid, 256, 257) == pytest.approx(
        math.exp(sum(losses) / 3), rel=1e-12
    )


def test_vocabulary_must_fit() -> None:
    check_vocabulary(Bytes(), 258)
    with pytest.raises(
        DataError,
        match=r"257 .*embedding\.vocab_size .*258",
    ):
        check_vocabulary(Bytes(), 257)
